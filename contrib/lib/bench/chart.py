"""The bar chart (SVG, light): for each cell one bar a server, its rate at the left and its CPU per I/O at the right.

Cells differ by orders of magnitude, so each cell is a scale of its own: its longest bar is full length, and each bar
carries its figure.
"""
from html import escape

import report
from cells import CELLS
from record import CEILING, OURS, RATE, SERVER_CPU, grouped, medians

BAR, GAP, GROUP_GAP = 13, 3, 16
LABELS, LENGTH, FIGURE, SPACE = 128, 250, 70, 26
OURS_COLOUR, PEER_COLOURS, CEILING_COLOUR = "#c2410c", ("#334155", "#64748b", "#94a3b8"), "#e2e8f0"
STYLE = ("text{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;font-size:12px;fill:#1e293b}"
         ".title{font-size:16px;font-weight:600}.head{font-weight:600}.soft{fill:#64748b}"
         ".figure{font-size:11px;fill:#475569}.ours{font-weight:600;fill:#c2410c}")


def headline_section(records):
    """What is drawn: the first section, and of the cells the headlines where there are any."""
    middle = medians(records)
    if not middle:
        return "", []
    section = middle[0].section
    own = [record for record in middle if record.section == section]
    headlines = [record for record in own if record.cell in CELLS and CELLS[record.cell].headline]
    return section, headlines or own


def colours(records):
    """A colour for each contestant: ours stands out, the ceiling steps back."""
    result, peers = {}, list(PEER_COLOURS)
    for record in records:
        if record.contestant not in result:
            fixed = {OURS: OURS_COLOUR, CEILING: CEILING_COLOUR}
            result[record.contestant] = fixed.get(record.role) or (peers.pop(0) if peers else PEER_COLOURS[-1])
    return result


def text(x, y, words, kind="", anchor="start"):
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{kind}>{escape(words)}</text>'


def bar(x, y, value, longest, record, colour, words):
    """One bar with its figure; what failed or was not measured says so in the place of the bar."""
    kind = "figure ours" if record.role == OURS else "figure"
    if value is None:
        return [text(x, y + BAR - 3, "failed" if record.error else "-", kind)]
    width = max(1, round(LENGTH * value / longest, 1))
    return [f'<rect x="{x}" y="{y}" width="{width}" height="{BAR}" rx="2" fill="{colour}"/>',
            text(x + width + 5, y + BAR - 3, words, kind)]


def svg(header, records):
    section, drawn = headline_section(records)
    paint = colours(drawn)
    left, right = LABELS + 8, LABELS + 8 + LENGTH + FIGURE + SPACE
    parts = [text(16, 28, f"NBD servers, {section}", "title"),
             text(16, 47, f"{header['cpu']}, {header['cores']} cores; {header['kernel']}; {header['runs']}; "
                  f"{header['date'][:10]}", "soft")]
    x = 16
    for name, colour in paint.items():
        parts += [f'<rect x="{x}" y="60" width="11" height="11" rx="2" fill="{colour}"/>',
                  text(x + 16, 70, name, "ours" if colour == OURS_COLOUR else "")]
        x += 34 + 7 * len(name)
    y = 100
    parts += [text(left, y, "throughput (longer is better)", "head"),
              text(right, y, "CPU of the server (shorter is better)", "head")]
    y += 14
    for group in grouped(drawn, "cell", "client").values():
        middle = y + (len(group) * (BAR + GAP) - GAP) / 2 + 4
        parts.append(text(LABELS, middle, report.label(group[0], drawn), "head", "end"))
        for record in group:
            for x, metric in ((left, RATE), (right, SERVER_CPU)):
                longest = max((getattr(other, metric.field) or 0 for other in group), default=0) or 1
                parts += bar(x, y, getattr(record, metric.field), longest, record, paint[record.contestant],
                             report.shown(record, metric))
            y += BAR + GAP
        y += GROUP_GAP
    parts.append(text(16, y + 6, "Each cell has its own scale; CPU time is per I/O, of copies per MiB. "
                      "nbdkit null has no storage: it marks what client and socket leave.", "soft"))
    width, height = right + LENGTH + FIGURE + 16, y + 22
    start = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}">\n<style>{STYLE}</style>\n'
             '<rect width="100%" height="100%" fill="#ffffff"/>\n')
    return start + "\n".join(parts) + "\n</svg>\n"
