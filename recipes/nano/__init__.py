"""The small lab: does a mixture of weak encoders help? Data, pre-training, compared runs and their report."""
