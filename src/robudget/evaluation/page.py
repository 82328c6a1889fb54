"""Verdicts in words: the page that an evaluation prints and keeps as verdict.txt. Imports no torch."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from robudget.threat import CUSTOMARY

if TYPE_CHECKING:
    from robudget.evaluation.verdicts import Verdicts


def page(verdicts: Verdicts) -> str:
    """The verdict in words; ends with a newline."""
    v, about = verdicts, verdicts.about
    low, high = (100 * end for end in v.interval)
    clean_low, clean_high = (100 * end for end in v.clean_interval)
    dataset = str(about.get("dataset"))
    customary = f" (customary for {dataset})" if v.threat == CUSTOMARY.get(dataset) else ""
    interval = "95% Wilson interval" if v.audit is None else "an estimate; at least 95%, for the images and the audit"
    lines = [
        f"Robust accuracy {100 * v.robust_accuracy:.2f}% [{low:.2f}, {high:.2f}] "
        f"against {v.threat}{customary}, on {v.n} images ({interval})",
        *_audit_lines(v),
        *_votes_lines(v),
        f"Clean accuracy  {100 * v.clean_accuracy:.2f}% [{clean_low:.2f}, {clean_high:.2f}]",
        "",
        f"Model     {about.get('weights', 'unknown')}",
        f"Attacks   {about.get('version', 'unknown')}: {', '.join(about.get('members', ()))}; seed {about.get('seed')}",
        *_gradient_lines(v),
        *_transfer_lines(v),
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
            f"{item.forward + item.surrogate_forward:>12}{item.backward + item.surrogate_backward:>12}"
            f"{_flops(item.flops):>10}{_wh(item.energy_kwh):>9}"
        )
    total = v.total
    forward, backward = total.forward + total.surrogate_forward, total.backward + total.surrogate_backward
    lines += [
        f"{'in all':<20}{v.n:>8}{int((~v.robust).sum()):>8}{100 * v.robust_accuracy:>8.2f}{v.seconds:>10.1f}"
        f"{forward:>12}{backward:>12}{_flops(v.flops):>10}{_wh(v.energy_kwh):>9}",
        f"Passes are of images, padding included; FLOP {'unknown' if v.flops is None else 'counted'}; "
        f"energy of GPU, CPU and memory, without PUE: {v.energy_how or 'not metered'}",
        *(
            [f"Of these passes, {total.surrogate_forward} forward and {total.surrogate_backward} backward: surrogate"]
            if total.surrogate_forward
            else []
        ),
        *(_wrap(f"Confirmation: {v.confirmation}", "") if v.confirmation is not None else ()),
        "",
    ]
    if not v.findings:
        lines.append("Checks: no finding.")
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


def _gradient_lines(v: Verdicts) -> list[str]:
    backward = v.about.get("backward")
    text = f"Gradients of the surrogate {backward} (BPDA); logits and successes are those of the model as given"
    return [text] if backward else []


def _votes_lines(v: Verdicts) -> list[str]:
    if v.votes is None or v.right_in_passes is None:
        return []
    clean, worst = (100 * share for share in v.right_in_passes)
    return _wrap(
        f"A randomised model: an image counts as misclassified where more than half of {v.votes['passes']} passes err. "
        f"Of single passes {clean:.2f}% are right on the images, and at most {worst:.2f}% on the strongest examples "
        f"found. Examples of {v.votes['tried']} images were judged; {v.votes['stand']} stand.",
        "",
    )


def _transfer_lines(v: Verdicts) -> list[str]:
    return [
        f"Transfer  {item['file']}: examples of {item['examples']} of these images (made for {item['threat']}"
        + (f"; {item['outside']} outside the ball, moved into it)" if item["outside"] else ")")
        for item in v.about.get("transfer", ())
    ]


def _audit_lines(v: Verdicts) -> list[str]:
    if v.audit is None or v.audit_interval is None:
        return []
    low, high = (100 * end for end in v.audit_interval)
    return _wrap(
        f"The full ensemble would leave {low:.2f} to {high:.2f}% of these images (95%, exact; not more is certain): "
        f"{v.audit}",
        "",
    )


def _flops(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2e}"


def _wh(kwh: float | None) -> str:
    return "unknown" if kwh is None else f"{1000 * kwh:.3g}"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
