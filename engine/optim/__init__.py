"""Optimizers, schedules, clipping and loss scaling, by the names of the configuration."""
