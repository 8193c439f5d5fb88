"""The figures in words: tables for the terminal and in Markdown, JSON, and where nbdbridge loses. Measures nothing."""
import dataclasses
import json

from record import (EACH, METRICS, P50, P99, P999, PEAK, RATE, SERVER_CPU, TOTAL_CPU, best, grouped, medians,
                    ours_of, ratio)

# Below this much worse than a peer counts as level: medians of a few rounds are no better than that.
LEVEL = 0.03
COLUMNS = (("rate", RATE), ("p50", P50), ("p99", P99), ("p99.9", P999), ("CPU server", SERVER_CPU),
           ("CPU both", TOTAL_CPU), ("peak MiB", PEAK), ("KiB each", EACH))
RATIO_HEADS = ("rate: to the best", "CPU: to the leanest")


def rate(value, unit):
    """1234567 IOPS -> "1.23 M", MB/s with its unit."""
    if value is None:
        return "-"
    if unit == "MB/s":
        return f"{value / 1000:.2f} GB/s" if value >= 1000 else f"{value:.0f} MB/s"
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value / 1e3:.1f} k" if value >= 1e3 else f"{value:.0f}"


def micros(value):
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value / 1000:.1f} ms"
    return f"{value:.0f} us" if value >= 100 else f"{value:.1f} us" if value >= 10 else f"{value:.2f} us"


def times(value):
    return "-" if value is None else f"{value:.2f} x"


def shown(record, metric):
    value = getattr(record, metric.field)
    if metric is RATE:
        return rate(value, record.unit)
    if metric in (PEAK, EACH):
        return "-" if value is None else f"{value / 1024 if metric is PEAK else value:.1f}"
    return micros(value)


def label(record, cells):
    """A cell's name, and the client where one cell was run by more than one."""
    clients = {other.client for other in cells if other.cell == record.cell}
    return f"{record.cell} ({record.client})" if len(clients) > 1 else record.cell


def against(ours, peers, metric):
    """What nbdbridge makes of the peer that is best by a metric: "1.30 x nbdkit file"."""
    peer = best(peers, metric)
    value = ratio(ours, peer, metric)
    return "-" if value is None else f"{times(value)} {peer.contestant}"


def ratios(ours, group):
    """The last two columns of every table."""
    return against(ours, group, RATE), against(ours, group, SERVER_CPU)


def detail(records):
    """Every figure of a section: head and rows."""
    columns = [(title, metric) for title, metric in COLUMNS
               if any(getattr(record, metric.field) is not None for record in records)]
    head = ["cell", "server", *(title for title, _ in columns), *RATIO_HEADS]
    rows = []
    for group in grouped(records, "cell", "client").values():
        for record in group:
            start = [label(record, records) if record is group[0] else "", record.contestant]
            if record.error:
                rows.append([*start, "FAILED", *["-"] * (len(columns) + 1)])
                continue
            ours = record is ours_of(group)
            rows.append([*start, *(shown(record, metric) for _, metric in columns),
                         *(ratios(record, group) if ours else ("", ""))])
    return head, rows


def summary(records):
    """A line for each cell: ours beside everybody, rate and server CPU."""
    names = list(dict.fromkeys(record.contestant for record in records))
    head = ["cell", *names, *RATIO_HEADS]
    rows = []
    for group in grouped(records, "cell", "client").values():
        by_name = {record.contestant: record for record in group}
        ours = ours_of(group)
        cells = []
        for name in names:
            record = by_name.get(name)
            if record is None:
                cells.append("-")
            elif record.error:
                cells.append("FAILED")
            else:
                cells.append(f"{shown(record, RATE)}; {shown(record, SERVER_CPU)}")
        rows.append([label(group[0], records), *cells, *ratios(ours, group)])
    return head, rows


def aligned(head, rows):
    """A table for a terminal; figures at the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        lines.append("  ".join(text.ljust(width) if column < 2 or column >= len(head) - 2 else text.rjust(width)
                               for column, (text, width) in enumerate(zip(row, widths))).rstrip())
    return "\n".join(lines)


def markdown_table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def losses(middle):
    """For each metric and section the cells in which a peer is better by more than LEVEL, the worst first."""
    result = []
    for metric in METRICS:
        lost = []
        for group in grouped(middle, "suite", "section", "cell", "client").values():
            ours, peer = ours_of(group), best(group, metric)
            value = ratio(ours, peer, metric)
            if value is not None and (value < 1 - LEVEL if metric.more_is_better else value > 1 + LEVEL):
                badness = 1 / max(value, 1e-9) if metric.more_is_better else value
                lost.append((badness, ours.section, f"{label(ours, middle)} {times(value)} {peer.contestant}"))
        lost.sort(key=lambda entry: -entry[0])
        by_section = {}
        for _, section, text in lost:
            by_section.setdefault(section, []).append(text)
        result += [(metric, section, texts) for section, texts in by_section.items()]
    return result


def verdict(records):
    """The last paragraph."""
    middle = medians(records)
    lines = [f"Where nbdbridge loses (to the peer that is best there, by more than {LEVEL:.0%}):", ""]
    found = losses(middle)
    for metric, section, texts in found:
        lines.append(f"- {metric.title}; {section}: {', '.join(texts)}")
    if not any(ratio(ours_of(group), best(group, RATE), RATE)
               for group in grouped(middle, "suite", "section", "cell", "client").values()):
        lines.append("- cannot be said: it was not measured beside a peer")
    elif not found:
        lines.append("- nowhere in this run")
    for record in records:
        if record.error:
            lines.append(f"- FAILED: {record.section}: {record.cell}: {record.contestant}: {record.error}")
    return "\n".join(lines)


def head_lines(header):
    return [f"{key}: {value}" for key, value in header.items()]


NOTES = ("CPU is user and system time per I/O (of a copy: per MiB), of the server, and of client and server together. "
         "nbdkit null has no storage: it marks what client and socket leave, and is no peer. "
         "nbdkit file has no O_DIRECT: where others use it, it empties the page cache behind it (cache=none). "
         "In QEMU the CPU is the whole machine's, for the server less fio's; there kernel loop, and kernel nbd on nbdbridge, "
         "are marks.")


def terminal(header, records):
    parts = ["\n".join(head_lines(header)), NOTES]
    for (section,), group in grouped(medians(records), "section").items():
        parts.append(f"{section}:\n\n{aligned(*detail(group))}")
    return "\n\n".join([*parts, verdict(records)])


def markdown(header, records):
    parts = ["\n".join(f"- {line}" for line in head_lines(header)),
             f"{NOTES} A cell shows rate; server CPU."]
    sections = grouped(medians(records), "section").items()
    parts += [f"{section}:\n\n{markdown_table(*summary(group))}" for (section,), group in sections]
    parts += [f"<details><summary>{section}: all figures</summary>\n\n{markdown_table(*detail(group))}\n\n</details>"
              for (section,), group in sections]
    return "\n\n".join([*parts, verdict(records)]) + "\n"


def as_json(header, records):
    return json.dumps({"header": header, "medians": [dataclasses.asdict(record) for record in medians(records)],
                       "rounds": [dataclasses.asdict(record) for record in records]}, indent=1) + "\n"
