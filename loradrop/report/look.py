"""Marks, colours, and how figures are written: in the report, the pictures and the terminal."""

MARKS = {"own": "●", "shared": "○", "none": "·"}
PLAIN_MARKS = {"own": "#", "shared": "o", "none": "."}  # where a stream cannot write those
MEANINGS = {"own": "own adapter", "shared": "shared adapter", "none": "no adapter"}
COMPOSED = {"own": "adapter, as the method makes it"}  # of banks without pairs; others may share it
# The light scheme of assets/report.html. Importance is lightness: it reads with any colour vision.
INK, MUTED, RULE, OWN = "#1f2a33", "#5f6b76", "#e1e4e3", "#d55e00"
RAMP, ON_HOT = ("#eaf2ee", "#6fb4bd", "#0a4a70"), 0.65  # light figures from that part on
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5598f", "#b07d00", "#4a9bd1")


def as_percent(part: float) -> str:
    return f"{100 * part:.1f}" if 0 < part < 0.0995 else f"{100 * part:.0f}"


def layer_name(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def duration(seconds: float) -> str:
    (minutes, rest), hours = divmod(round(seconds), 60), round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
