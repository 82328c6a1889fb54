"""The checks on what the attacks did: whether the verdicts themselves speak against the robust accuracy."""

from __future__ import annotations

from robudget.evaluation.audit import HITS
from robudget.evaluation.checks import ADAPTIVE
from robudget.evaluation.spent import Finding
from robudget.evaluation.verdicts import Verdicts


def check_verdicts(verdicts: Verdicts) -> list[Finding]:
    """The checks on what the attacks did."""
    findings = []
    by = verdicts.broken_by
    white = [item.attack for item in verdicts.spent if item.attack.startswith(("apgd", "fab", "pgd"))]
    square = int((by == "square").sum())
    if white and square / len(by) > 0.002:
        findings.append(
            Finding(
                "masked-gradients",
                "Square, which needs no gradients, breaks images that no white-box attack broke",
                {"images": square, "points": 100 * square / len(by)},
                ADAPTIVE,
            )
        )
    names = [item.attack for item in verdicts.spent]
    transferred = int((by == "transfer").sum())
    last = bool(white) and "transfer" in names and names.index("transfer") > names.index(white[-1])
    if last and verdicts.audit is None and transferred / len(by) > 0.002:
        findings.append(
            Finding(
                "transfer-breaks",
                "examples that were made on another model break images that no white-box attack broke",
                {"images": transferred, "points": 100 * transferred / len(by)},
                ADAPTIVE,
            )
        )
    confirmation = verdicts.confirmation
    if confirmation is not None and confirmation.fell:
        findings.append(
            Finding(
                "float32-changed",
                f"of {confirmation.attacked} survivors that were attacked again in float32, "
                f"{confirmation.fell} fell after all",
                {
                    "verdicts_changed": confirmation.fell,
                    "attacked_again": confirmation.attacked,
                    "not_attacked_again": confirmation.rest,
                    "would_fall_at_most": confirmation.at_most,
                },
                "Evaluate this model with precision='float32', or attack all survivors again (confirm='all').",
            )
        )
    if verdicts.about.get("halved"):
        findings.append(
            Finding(
                "batch-halved",
                "memory ran out, and the evaluation went on with smaller batches",
                {"sizes": str(verdicts.about["halved"])},
                "Verdicts may differ in the last bits from those at the batch size asked for.",
            )
        )
    return findings


# Findings after which short attacks with gradients say nothing.
MASKING = (
    "dynamic", "finite-differences", "masked-gradients", "no-gradient", "not-finite", "not-monotone", "probabilities",
    "randomised", "survives-large-eps", "transfer-breaks", "zero-gradients",
)  # fmt: skip


def check_audit(verdicts: Verdicts) -> list[Finding]:
    """Of version quick: is the full ensemble due? Where the audit hit too often, or gradients seem masked."""
    audit = verdicts.audit
    if audit is None:
        return []
    masked = [finding.name for finding in verdicts.findings if finding.name in MASKING]
    weak = audit.hit_rate > HITS
    if not weak and not masked:
        return []
    why = [f"the full ensemble broke {audit.fell} of {audit.attacked} audited images"] if weak else []
    why += [f"the checks found {', '.join(masked)}"] if masked else []
    return [
        Finding(
            "run-standard",
            f"short attacks are not enough for this model: {'; '.join(why)}",
            {"audited": audit.attacked, "fell": audit.fell, "threshold": HITS},
            "Run the full ensemble: version='standard'.",
        )
    ]
