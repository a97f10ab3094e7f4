"""A bar chart as SVG, without a library."""

from collections.abc import Mapping
from html import escape

BAR, GAP, LEFT, WIDTH = 18, 8, 200, 520
OURS, PEER, GOAL = "#2f6f8f", "#b9bec4", "#c8452f"


def bars(title: str, values: Mapping[str, float], goals: Mapping[str, float]) -> str:
    """Horizontal bars, longest first; those with a goal are ours, and the goal is a mark across the bar."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    scale = WIDTH / max([1.0, *values.values()])
    height = 48 + len(ordered) * (BAR + GAP)
    size = f'width="{LEFT + WIDTH + 70}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(ordered):
        y = 36 + number * (BAR + GAP)
        colour = OURS if name in goals else PEER
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LEFT + value * scale + 6:.1f}" y="{y + 13}">{value:.2f}</text>',
        ]
        if name in goals:
            x = LEFT + goals[name] * scale
            parts.append(f'<path d="M{x:.1f} {y - 2}v{BAR + 4}" stroke="{GOAL}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])
