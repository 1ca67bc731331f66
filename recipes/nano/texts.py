"""What is said in the clips: English commands of a small grammar, and sentences of seven languages.

Phrases of the validation and test splits never occur in training: commands are divided by a hash of their text, the
sentences of the languages also by their parts, so that the test has words that were never heard.
"""

from __future__ import annotations

import zlib
from random import Random

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")

_ROOMS = ("kitchen", "bedroom", "garden", "office", "cellar", "attic")
_THINGS = ("light", "window", "door", "heater", "radio", "curtain", "oven", "fan")
_DEEDS = ("open", "close", "check", "clean", "repair", "lock")
_PEOPLE = ("anna", "peter", "maria", "thomas", "julia", "robert", "susan", "david")
_PLACES = ("london", "paris", "the coast", "the village", "the island", "the airport", "the city", "the mountains")
_WHEN = ("today", "tomorrow", "tonight", "at noon", "in the morning", "after lunch", "on monday", "on friday")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_FOOD = ("bread", "coffee", "water", "soup", "apples", "rice", "cheese", "butter")
_SIZES = ("small", "large", "red", "blue", "green", "cold", "warm", "old")
_GOODS = ("box", "bottle", "chair", "table", "jacket", "bicycle", "lamp", "carpet")
_SKIES = ("sunny", "cloudy", "windy", "rainy", "foggy", "stormy")

# The words of the bundled clips may occur, their sentences never.
_HELD_OUT = {"the next train to the coast leaves from platform four", "yes of course"}


def command(random: Random, split: str) -> str:
    """A phrase of the grammar that belongs to the split: lower case, 2 to 9 words."""
    while True:
        phrase = random.choice(_RULES)(random.choice)
        if phrase not in _HELD_OUT and _split_of(phrase) == split:
            return phrase


_RULES = (
    lambda one: f"{one(_DEEDS)} the {one(_ROOMS)} {one(_THINGS)}",
    lambda one: f"turn {one(('on', 'off'))} the {one(_THINGS)} in the {one(_ROOMS)}",
    lambda one: f"the next {one(('train', 'bus', 'boat'))} to {one(_PLACES)} leaves {one(_WHEN)}",
    lambda one: f"the {one(('train', 'bus', 'boat'))} to {one(_PLACES)} leaves from platform {one(_NUMBERS)}",
    lambda one: f"call {one(_PEOPLE)} {one(_WHEN)}",
    lambda one: f"my number is {one(_NUMBERS)} {one(_NUMBERS)} {one(_NUMBERS)}",
    lambda one: f"we need {one(_NUMBERS)} {one(('boxes', 'bags', 'pounds'))} of {one(_FOOD)}",
    lambda one: f"buy {one(_FOOD)} and {one(_FOOD)} {one(_WHEN)}",
    lambda one: f"{one(_PEOPLE)} has a {one(_SIZES)} {one(_GOODS)}",
    lambda one: f"where is the {one(_SIZES)} {one(_GOODS)}",
    lambda one: f"it will be {one(_SKIES)} {one(_WHEN)}",
    lambda one: f"{one(('yes', 'no', 'maybe'))} {one(('please', 'of course', 'thank you', 'not yet', 'i am sure'))}",
    lambda one: f"{one(_PEOPLE)} and {one(_PEOPLE)} go to {one(_PLACES)}",
)


def _split_of(phrase: str) -> str:
    share = zlib.crc32(phrase.encode()) % 10
    return (VALIDATION, TEST)[share] if share < 2 else TRAIN


def sentence(language: str, random: Random, split: str) -> str:
    """Two or three parts of a sentence in the language; the last quarter of each list is for the test alone."""
    while True:
        lists = [_part(options, split) for options in SENTENCES[language]]
        parts = [random.choice(options) for options in lists]
        parts = parts if random.random() < 0.3 else random.choice((parts[:2], parts[::2], parts[1:]))
        phrase = " ".join(parts)
        if split == TEST or (zlib.crc32(phrase.encode()) % 10 == 0) == (split == VALIDATION):
            return phrase


def _part(options: tuple[str, ...], split: str) -> tuple[str, ...]:
    first_of_test = len(options) * 3 // 4
    return options[first_of_test:] if split == TEST else options[:first_of_test]


def _lists(*texts: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(text.split(", ")) for text in texts)


# language: beginnings, middles, ends
SENTENCES = {
    "English": _lists(
        "my brother bought, the old teacher forgot, we have often seen, she wants to sell, they finally built, "
        "nobody here knows, the children painted, our neighbours found, you should read, he quickly wrote, "
        "some people like, the doctor described",
        "a strange letter, the wooden bridge, this heavy machine, many beautiful flowers, the wrong answer, "
        "a quiet little house, both of the horses, her favourite story, the broken mirror, several new shops, "
        "an empty suitcase, the whole truth",
        "before the winter, with great pleasure, near the river, for the first time, without any help, "
        "last wednesday evening, because of the weather, in another country, at the market, two weeks ago, "
        "under the stairs, behind the church",
    ),
    "German": _lists(
        "mein bruder kaufte, der alte lehrer vergaß, wir haben oft gesehen, sie möchte verkaufen, endlich bauten sie, "
        "niemand hier kennt, die kinder malten, unsere nachbarn fanden, du solltest lesen, er schrieb schnell, "
        "manche leute mögen, ich wünsche mir",
        "einen merkwürdigen brief, die hölzerne brücke, diese schwere maschine, viele schöne blumen, "
        "die falsche antwort, ein ruhiges häuschen, beide pferde, ihre lieblingsgeschichte, den zerbrochenen spiegel, "
        "mehrere neue geschäfte, einen leeren koffer, das ganze frühstück",
        "vor dem winter, mit großem vergnügen, in der nähe des flusses, zum ersten mal, ohne jede hilfe, "
        "letzten mittwoch abend, wegen des schlechten wetters, in einem anderen land, auf dem markt, vor zwei wochen, "
        "unter der treppe, zwischen den häusern",
    ),
    "French": _lists(
        "mon frère a acheté, le vieux professeur oublie, nous avons souvent vu, elle veut vendre, "
        "ils ont enfin construit, personne ici ne connaît, les enfants dessinent, nos voisins ont trouvé, "
        "tu devrais lire, il écrivait vite, certaines personnes aiment, je cherche toujours",
        "une lettre étrange, le pont en bois, cette lourde machine, beaucoup de belles fleurs, la mauvaise réponse, "
        "une petite maison tranquille, les deux chevaux, son histoire préférée, le miroir cassé, "
        "plusieurs nouveaux magasins, une valise vide, toute la vérité",
        "avant l'hiver, avec grand plaisir, près de la rivière, pour la première fois, sans aucune aide, "
        "mercredi dernier au soir, à cause du mauvais temps, dans un autre pays, au marché, il y a deux semaines, "
        "sous l'escalier, derrière l'église",
    ),
    "Spanish": _lists(
        "mi hermano compró, el viejo profesor olvidó, hemos visto muchas veces, ella quiere vender, "
        "por fin construyeron, nadie aquí conoce, los niños pintaron, nuestros vecinos encontraron, deberías leer, "
        "él escribió deprisa, a algunos les gusta, yo siempre busco",
        "una carta extraña, el puente de madera, esta máquina pesada, muchas flores hermosas, "
        "la respuesta equivocada, una casita tranquila, los dos caballos, su cuento favorito, el espejo roto, "
        "varias tiendas nuevas, una maleta vacía, toda la verdad",
        "antes del invierno, con mucho gusto, cerca del río, por primera vez, sin ninguna ayuda, "
        "el miércoles por la noche, a causa del mal tiempo, en otro país, en el mercado, hace dos semanas, "
        "debajo de la escalera, detrás de la iglesia",
    ),
    "Italian": _lists(
        "mio fratello ha comprato, il vecchio maestro dimentica, abbiamo visto spesso, lei vuole vendere, "
        "finalmente costruirono, qui nessuno conosce, i bambini dipingono, i nostri vicini trovarono, "
        "dovresti leggere, egli scriveva in fretta, ad alcuni piace, io cerco sempre",
        "una lettera strana, il ponte di legno, questa macchina pesante, molti bei fiori, la risposta sbagliata, "
        "una casetta tranquilla, entrambi i cavalli, la sua storia preferita, lo specchio rotto, "
        "parecchi negozi nuovi, una valigia vuota, tutta la verità",
        "prima dell'inverno, con grande piacere, vicino al fiume, per la prima volta, senza alcun aiuto, "
        "mercoledì scorso di sera, a causa del maltempo, in un altro paese, al mercato, due settimane fa, "
        "sotto la scala, dietro la chiesa",
    ),
    "Russian": _lists(
        "мой брат купил, старый учитель забыл, мы часто видели, она хочет продать, они наконец построили, "
        "здесь никто не знает, дети рисовали, наши соседи нашли, тебе надо прочитать, он быстро написал, "
        "некоторые люди любят, я всегда ищу",
        "странное письмо, деревянный мост, эту тяжёлую машину, много красивых цветов, неправильный ответ, "
        "тихий маленький дом, обеих лошадей, её любимую сказку, разбитое зеркало, несколько новых магазинов, "
        "пустой чемодан, всю правду",
        "перед зимой, без лишних слов, возле реки, в первый раз, без всякой помощи, "
        "в прошлую среду вечером, из-за плохой погоды, в другой стране, на рынке, две недели назад, под лестницей, "
        "за церковью",
    ),
    "Hindi": _lists(
        "मेरे भाई ने खरीदा, बूढ़ा शिक्षक भूल गया, हमने अक्सर देखा है, वह बेचना चाहती है, आखिर उन्होंने बनाया, "
        "यहाँ कोई नहीं जानता, बच्चों ने चित्र बनाया, हमारे पड़ोसियों को मिला, तुम्हें पढ़ना चाहिए, उसने जल्दी लिखा, "
        "कुछ लोगों को पसंद है, मैं हमेशा ढूँढता हूँ",
        "एक अजीब चिट्ठी, लकड़ी का पुल, यह भारी मशीन, बहुत सारे सुंदर फूल, गलत जवाब, एक शांत छोटा घर, दोनों घोड़े, "
        "उसकी पसंदीदा कहानी, टूटा हुआ शीशा, कई नई दुकानें, एक खाली संदूक, पूरी सच्चाई",
        "सर्दी से पहले, बड़ी खुशी के साथ, नदी के पास, पहली बार, बिना किसी मदद के, पिछले बुधवार की शाम, "
        "खराब बारिश के कारण, किसी दूसरे देश में, बाज़ार में, दो हफ़्ते पहले, सीढ़ियों के नीचे, मंदिर के पीछे",
    ),
}
