"""A picture of a simulation: who was in memory when, and how many waited."""

from xml.sax.saxutils import escape

from trio_router.simulation.report import queue_over_time
from trio_router.simulation.run import Outcome

WIDTH, LEFT, LANE, QUEUE, MARGIN = 960, 160, 18, 120, 24
COLOURS = ("#4878a8", "#b05a3c", "#5a8f4e", "#8a62a8", "#a88a3c", "#3c9a9a")


def svg(outcome: Outcome) -> str:
    """It, as SVG."""
    aliases = sorted({stay.model for stay in outcome.stays})
    height = MARGIN + QUEUE + MARGIN + LANE * len(aliases) + MARGIN
    across = (WIDTH - LEFT - MARGIN) / (outcome.seconds or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    points = WIDTH - LEFT - MARGIN
    queue = queue_over_time(outcome, points)
    most = max(queue, default=0) or 1
    line = " ".join(f"{LEFT + x},{MARGIN + QUEUE * (1 - count / most):.1f}" for x, count in enumerate(queue))
    parts.append(f'<text x="8" y="{MARGIN + 12}">waiting, up to {most}</text>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="#333"/>')
    top = MARGIN + QUEUE + MARGIN
    for lane, alias in enumerate(aliases):
        parts.append(f'<text x="8" y="{top + lane * LANE + 13}">{escape(alias[:24])}</text>')
    for stay in outcome.stays:
        lane = aliases.index(stay.model)
        parts.append(
            f'<rect x="{LEFT + stay.began * across:.2f}" y="{top + lane * LANE + 2}" height="{LANE - 4}" '
            f'width="{max(0.5, (stay.ended - stay.began) * across):.2f}" fill="{COLOURS[lane % len(COLOURS)]}"/>'
        )
    parts.append(f'<text x="{LEFT}" y="{height - 8}">0 s</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{height - 8}" text-anchor="end">{outcome.seconds:.0f} s</text>')
    return "\n".join([*parts, "</svg>", ""])
