"""One page of text that a reviewer can read: the accuracy, how it was come by, and what speaks against it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robudget.evaluation.verdicts import Verdicts


def page(verdicts: Verdicts) -> str:
    """The verdict in words; ends with a newline."""
    v, about = verdicts, verdicts.about
    low, high = (100 * end for end in v.interval)
    clean_low, clean_high = (100 * end for end in v.clean_interval)
    lines = [
        f"Robust accuracy {100 * v.robust_accuracy:.2f}% [{low:.2f}, {high:.2f}] "
        f"against {v.threat}, on {v.n} images (95% Wilson interval)",
        f"Clean accuracy  {100 * v.clean_accuracy:.2f}% [{clean_low:.2f}, {clean_high:.2f}]",
        "",
        f"Model     {about.get('weights', 'unknown')}",
        f"Attacks   {about.get('version', 'unknown')}: {', '.join(about.get('members', ()))}; seed {about.get('seed')}",
        f"Computed  in {about.get('precision')} on {about.get('device')}, {about.get('threads')} threads, "
        f"batch {about.get('batch_size')}; every success confirmed in float32 on the model as given",
        "",
        f"{'attack':<20}{'images':>8}{'broken':>8}{'left %':>8}{'seconds':>10}{'forward':>12}{'backward':>12}"
        f"{'FLOP':>10}{'Wh':>9}",
    ]
    left = v.after_each()
    for item in v.spent:
        share = f"{100 * left[item.attack]:.2f}" if item.attack in left else ""
        lines.append(
            f"{item.attack:<20}{item.images:>8}{item.broken:>8}{share:>8}{item.seconds:>10.1f}"
            f"{item.forward:>12}{item.backward:>12}{_flops(item.flops):>10}{_wh(item.energy_kwh):>9}"
        )
    forward, backward = (sum(getattr(item, key) for item in v.spent) for key in ("forward", "backward"))
    lines += [
        f"{'in all':<20}{v.n:>8}{int((~v.robust).sum()):>8}{100 * v.robust_accuracy:>8.2f}{v.seconds:>10.1f}"
        f"{forward:>12}{backward:>12}{_flops(v.flops):>10}{_wh(v.energy_kwh):>9}",
        f"Passes are of images, padding included; FLOP {'unknown' if v.flops is None else 'counted'}; "
        f"energy at the plug, without PUE: {v.energy_how or 'not metered'}",
        "",
    ]
    if not v.findings:
        lines.append("Checks: nothing was found that speaks against these numbers.")
    else:
        lines.append(f"Checks: {len(v.findings)} finding{'s' if len(v.findings) > 1 else ''}")
        for finding in v.findings:
            lines += ["", *_wrap(f"[{finding.name}] {finding.message}", "  ")]
            if finding.evidence:
                lines += _wrap(
                    "evidence: " + ", ".join(f"{k} = {_short(x)}" for k, x in finding.evidence.items()), "    "
                )
            if finding.advice:
                lines += _wrap("advice: " + finding.advice, "    ")
    return "\n".join(lines) + "\n"


def _flops(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2e}"


def _wh(kwh: float | None) -> str:
    return "unknown" if kwh is None else f"{1000 * kwh:.3g}"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
