"""Spot GPUs: prices, traces of preemptions, how often to save, and what a job costs on them (`fastft estimate --spot`)."""
