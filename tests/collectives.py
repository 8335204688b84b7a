"""What devices send each other in a compiled program, read off its text."""

import re

import numpy as np


def gathered(text: str) -> list[int]:
    """Returns how many values each array has that is made of all devices' parts, on every one of them."""
    lines = re.findall(r"= (.*?) (?:all-gather|all-to-all)(?:-start)?\(", text)
    shapes = [shape for line in lines for shape in re.findall(r"\[([\d,]*)\]", line)]
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]
