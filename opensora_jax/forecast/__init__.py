"""Forecasts of a program on devices that are not here: whether it fits, what it sends, how long it takes."""
