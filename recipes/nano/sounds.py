"""Sounds made with numpy, every one with parameters of its own: ten events, three backgrounds, a telephone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RATE = 16_000

Draw = np.random.Generator
Sound = Callable[[Draw, int], np.ndarray]


def _time(samples: int) -> np.ndarray:
    return np.arange(samples) / RATE


def _band(noise: np.ndarray, low: float, high: float) -> np.ndarray:
    """Only what lies between two frequencies, with soft edges."""
    spectrum = np.fft.rfft(noise)
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE) + 1e-9
    gain = 1 / (1 + (low / hertz) ** 4) / (1 + (hertz / high) ** 4)
    return np.fft.irfft(spectrum * gain, len(noise))


def _noise(draw: Draw, samples: int, slope: float) -> np.ndarray:
    """Noise whose power falls with frequency ** slope: 0 is white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(draw.standard_normal(samples))
    hertz = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 20)
    return _unit(np.fft.irfft(spectrum / hertz ** (slope / 2), samples))


def _unit(wave: np.ndarray) -> np.ndarray:
    return wave / (np.abs(wave).max() + 1e-9)


def _place(samples: int, pieces: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Pieces laid over silence, each at its second."""
    wave = np.zeros(samples)
    for second, piece in pieces:
        start = int(second * RATE)
        piece = piece[: max(0, samples - start)]
        wave[start : start + len(piece)] += piece
    return _unit(wave)


def _tone(draw: Draw, frequency: np.ndarray | float, samples: int, partials: int = 1) -> np.ndarray:
    """A tone whose partials fall off at a random rate; frequency may change over time."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, (samples,))) / RATE
    fall = draw.uniform(0.8, 2.0)
    return sum(np.sin(k * phase) / k**fall for k in range(1, partials + 1))


def siren(draw: Draw, samples: int) -> np.ndarray:
    low = draw.uniform(350, 800)
    high = low * draw.uniform(1.5, 2.8)
    turn = _time(samples) * draw.uniform(0.4, 1.6) + draw.uniform()
    shape = draw.integers(3)
    if shape == 0:
        swing = np.abs(2 * (turn % 1) - 1)
    elif shape == 1:
        swing = 0.5 + 0.5 * np.sin(2 * np.pi * turn)
    else:
        swing = (turn % 1 < 0.5).astype(float)
    return _unit(_tone(draw, low + (high - low) * swing, samples, int(draw.integers(1, 5))))


def rain(draw: Draw, samples: int) -> np.ndarray:
    wash = _band(_noise(draw, samples, draw.uniform(0.3, 1.2)), draw.uniform(250, 900), draw.uniform(3500, 7500))
    slow = 1 + draw.uniform(0, 0.4) * np.sin(2 * np.pi * (_time(samples) * draw.uniform(0.2, 0.9) + draw.uniform()))
    drops = np.zeros(samples)
    for start in draw.integers(0, samples, int(draw.uniform(0, 60) * samples / RATE)):
        drops[start : start + 40] += draw.standard_normal(len(drops[start : start + 40])) * draw.uniform(0.1, 0.5)
    return _unit(_unit(wash) * slow + drops)


def wind(draw: Draw, samples: int) -> np.ndarray:
    low = _unit(_band(_noise(draw, samples, 1.5), 60, draw.uniform(250, 600)))
    turn = _time(samples) * draw.uniform(0.3, 1.0)
    slow, slower = (np.sin(2 * np.pi * (speed * turn + draw.uniform())) for speed in (1, 0.37))
    gusts = 0.55 + 0.45 * slow * slower
    howl = _tone(draw, 350 + 250 * gusts, samples) * gusts * draw.uniform(0, 0.15)
    return _unit(low * gusts + howl)


def engine(draw: Draw, samples: int) -> np.ndarray:
    turn = draw.uniform(22, 70) * (1 + draw.uniform(-0.2, 0.3) * _time(samples))
    phase = np.cumsum(turn) / RATE % 1
    pulses = np.exp(-phase * draw.uniform(5, 14)) * np.sin(2 * np.pi * phase * draw.uniform(2, 6))
    return _unit(_band(pulses + 0.15 * _noise(draw, samples, 1), 30, draw.uniform(900, 2500)))


def melody(draw: Draw, samples: int) -> np.ndarray:
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12])
    root, beat = 110 * 2 ** draw.uniform(0.5, 2.2), draw.uniform(0.2, 0.5)
    plucked, partials = draw.uniform() < 0.6, int(draw.integers(2, 8))
    pieces = []
    for i in range(int(samples / RATE / beat) + 1):
        pitch = root * 2 ** (draw.choice(scale) / 12)
        pieces.append((i * beat, _pluck(draw, pitch, beat) if plucked else _note(draw, pitch, beat, partials)))
    return _place(samples, pieces)


def _pluck(draw: Draw, pitch: float, seconds: float) -> np.ndarray:
    """A string after Karplus and Strong."""
    period, samples = int(RATE / pitch), int(seconds * RATE)
    ring, rows = draw.uniform(-1, 1, period), []
    for _ in range(samples // period + 1):
        rows.append(ring)
        ring = 0.996 * 0.5 * (ring + np.roll(ring, 1))
    return np.concatenate(rows)[:samples]


def _note(draw: Draw, pitch: float, seconds: float, partials: int) -> np.ndarray:
    samples = int(seconds * RATE)
    attack = np.minimum(1, np.arange(samples) / (0.02 * RATE))
    return _tone(draw, pitch, samples, partials) * attack * np.exp(-_time(samples) * draw.uniform(1, 6))


def knocks(draw: Draw, samples: int) -> np.ndarray:
    gap, high = draw.uniform(0.16, 0.45), draw.uniform(500, 3000)
    pieces, second = [], draw.uniform(0, 0.15)
    while second < samples / RATE:
        hit = int(draw.uniform(0.08, 0.14) * RATE)
        thud = _unit(_band(_noise(draw, hit, draw.uniform(1, 2)), 70, high)) * draw.uniform(0.6, 1)
        pieces.append((second, thud * np.exp(-_time(hit) * draw.uniform(25, 60))))
        second += gap * draw.uniform(0.93, 1.07)
    return _place(samples, pieces)


def bell(draw: Draw, samples: int) -> np.ndarray:
    root, gap = draw.uniform(350, 1100), draw.uniform(0.5, 1.4)
    ratios = np.array([0.5, 1, 1.19, 1.56, 2, 2.51, 3.01, 4.1]) * draw.uniform(0.98, 1.02, 8)
    pieces, second = [], draw.uniform(0, 0.2)
    while second < samples / RATE:
        t = _time(int(1.8 * RATE))
        tone = sum(np.sin(2 * np.pi * root * r * t) * np.exp(-t * (1 + r) * 1.2) / (1 + 0.4 * r) for r in ratios)
        pieces.append((second, tone * draw.uniform(0.7, 1)))
        second += gap
    return _place(samples, pieces)


def dog(draw: Draw, samples: int) -> np.ndarray:
    root, pieces, second = draw.uniform(220, 600), [], draw.uniform(0, 0.2)
    while second < samples / RATE:
        bark = int(draw.uniform(0.11, 0.22) * RATE)
        x = np.linspace(0, 1, bark)
        pitch = root * (0.8 + 0.9 * np.sin(np.pi * x**0.7)) * draw.uniform(0.9, 1.1)
        voice = _tone(draw, pitch, bark, 10) + 0.8 * _band(draw.standard_normal(bark), 500, 2500)
        pieces.append((second, _unit(voice) * np.sin(np.pi * x) ** 0.6))
        second += draw.uniform(0.28, 0.65)
    return _place(samples, pieces)


def beeps(draw: Draw, samples: int) -> np.ndarray:
    pitch, gap = draw.uniform(700, 2600), draw.uniform(0.18, 0.6)
    length = gap * draw.uniform(0.3, 0.6)
    tone = _tone(draw, pitch, int(length * RATE), int(draw.integers(1, 4)))
    return _place(samples, [(gap * i, tone) for i in range(int(samples / RATE / gap) + 1)])


def bird(draw: Draw, samples: int) -> np.ndarray:
    pieces, second = [], draw.uniform(0, 0.2)
    low = draw.uniform(2000, 3600)
    while second < samples / RATE:
        for _ in range(int(draw.integers(2, 6))):
            chirp = int(draw.uniform(0.04, 0.12) * RATE)
            x = np.linspace(0, 1, chirp)
            sweep = low * (1 + draw.uniform(-0.3, 0.6) * x + 0.1 * np.sin(2 * np.pi * x * draw.uniform(1, 4)))
            pieces.append((second, _tone(draw, sweep, chirp) * np.sin(np.pi * x)))
            second += chirp / RATE + draw.uniform(0.01, 0.06)
        second += draw.uniform(0.15, 0.5)
    return _place(samples, pieces)


def clock(draw: Draw, samples: int) -> np.ndarray:
    gap, pitches, pieces = draw.uniform(0.22, 0.55), draw.uniform(2000, 5500, 2), []
    for i in range(int(samples / RATE / gap) + 1):
        t = _time(int(0.03 * RATE))
        ring, click = np.sin(2 * np.pi * pitches[i % 2] * t), draw.standard_normal(len(t))
        pieces.append((gap * i, ring * np.exp(-t * 280) + 0.5 * click * np.exp(-t * 700)))
    return _place(samples, pieces)


EVENTS: dict[str, Sound] = {
    "a siren": siren,
    "a melody": melody,
    "knocks": knocks,
    "a bell": bell,
    "a dog": dog,
    "beeps": beeps,
    "a bird": bird,
    "a clock": clock,
}
BACKGROUNDS: dict[str, Sound] = {"rain": rain, "wind": wind, "an engine": engine}
NOISES: tuple[Sound, ...] = (rain, wind, engine, lambda draw, samples: _noise(draw, samples, draw.uniform(0, 2)))


def mix(wave: np.ndarray, noise: np.ndarray, decibels: float) -> np.ndarray:
    """The wave with noise that many decibels below it."""
    power, of_noise = (float(np.mean(x**2)) + 1e-9 for x in (wave, noise))
    return wave + noise * np.sqrt(power / of_noise) * 10 ** (-decibels / 20)


def telephone(wave: np.ndarray) -> np.ndarray:
    return _band(wave, 250, 3400)


def level(wave: np.ndarray, peak: float) -> np.ndarray:
    return (_unit(wave) * peak).astype(np.float32)
