"""`AutoAttack` with the authors' interface, so that a user changes one import:

    from robudget.interop.autoattack import AutoAttack

The names of both published packages are accepted: `attacks_to_run=` and `bs=` (the authors' own) and `attacks=` and
`batch_size=` (`pyautoattack`). Verdicts are `robudget.evaluation.evaluate`'s; the last ones are in `.verdicts`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from robudget.attacks.ensemble import Member, ensemble
from robudget.attacks.victim import Model, Victim, frozen
from robudget.errors import InputError, unknown
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.specification import Precision
from robudget.evaluation.state import identity_of_state
from robudget.evaluation.verdicts import Verdicts
from robudget.threat import Threat

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}
VERSIONS = ("standard", "plus", "rand", "custom")


@dataclass
class Settings:
    """The settings of one attack, under the authors' names."""

    n_restarts: int = 1
    n_iter: int = 100
    n_target_classes: int = 9
    n_queries: int = 5000
    eot_iter: int = 1
    use_largereps: bool = False
    p_init: float = 0.8

    def __setattr__(self, name: str, value: object) -> None:
        # A setting that nothing reads would seem to have an effect.
        if name not in {f.name for f in fields(self)}:
            raise unknown("setting", name, [f.name for f in fields(self)])
        super().__setattr__(name, value)


class AutoAttack:
    """The authors' class. `.apgd`, `.apgd_targeted`, `.fab` and `.square` may be changed before a run.

    `version` standard, plus or rand sets attacks and settings; custom keeps `attacks_to_run` and the authors' defaults
    (5 restarts for APGD and FAB). `seed` None: the clock. `precision` is ours: what the attacks compute in.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str = "cuda",
        log_path: str | Path | None = None,
        *,
        attacks: Sequence[str] | None = None,
        precision: Precision = "auto",
    ) -> None:
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        if version not in VERSIONS:
            raise unknown("version", version, VERSIONS)
        if is_tf_model:
            raise InputError("is_tf_model = True (allowed: False; TensorFlow models are not supported)")
        names = list(attacks if attacks is not None else attacks_to_run)
        if names and version != "custom":
            raise InputError(f"attacks_to_run = {names} with version = {version!r} (allowed: with version='custom')")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device = {str(device)!r}, but there is no CUDA GPU (allowed here: device='cpu')")
        self.model, self.norm, self.epsilon, self.seed = model, norm, eps, seed
        self.verbose, self.device, self.log_path = verbose, device, log_path
        self.precision = precision
        self.apgd = Settings(n_restarts=5)
        self.apgd_targeted = Settings()
        self.fab = Settings(n_restarts=5)
        self.square = Settings()
        self.attacks_to_run = names
        self.version = version
        self.verdicts: Verdicts | None = None
        if version != "custom":
            self.set_version(version)

    def set_version(self, version: str = "standard") -> None:
        """Attacks and settings of a published version."""
        members = ensemble(version, Threat(NORMS[self.norm], 0).norm)  # type: ignore[arg-type]
        self.version = version
        self.attacks_to_run = [member.name for member in members]
        for member in members:
            settings = self._settings(member.name)
            settings.n_restarts, settings.eot_iter = member.restarts, member.eot
            settings.use_largereps, settings.n_target_classes = member.large_eps, member.targets
        if version == "plus":
            # `fab` and `fab-t` share their settings in the authors' class, and fab-t always runs once.
            self.fab.n_restarts = 5

    def _settings(self, name: str) -> Settings:
        if name == "apgd-t":
            return self.apgd_targeted
        return {"apgd": self.apgd, "fab": self.fab, "square": self.square}[name.split("-")[0]]

    def members(self) -> list[Member]:
        """The attacks as they will run, with the settings as they are now."""
        out = []
        for name in self.attacks_to_run:
            settings = self._settings(Member(name).name)
            out.append(
                Member(
                    name,
                    restarts=1 if name == "fab-t" else settings.n_restarts,
                    targets=settings.n_target_classes,
                    steps=settings.n_queries if name == "square" else settings.n_iter,
                    eot=settings.eot_iter,
                    large_eps=settings.use_largereps,
                    p=settings.p_init,
                )
            )
        return out

    def get_logits(self, x: Tensor) -> Tensor:
        return self.model(x)

    def get_seed(self) -> int:
        return int(time.time()) if self.seed is None else int(self.seed)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
        *,
        batch_size: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x_adv as x_orig (the image itself where it is robust), with `return_labels` also what the model says of it.

        Called with `batch_size=`, as pyautoattack is, it returns both, as pyautoattack does. `state_path`, a folder
        here, is resumed from; unlike theirs, what is returned then holds what was found before, too.
        """
        size = bs if batch_size is None else batch_size
        x_adv = self._run(x_orig, y_orig, size, self.members(), state_path)
        return (x_adv, self._predict(x_adv, size)) if return_labels or batch_size is not None else x_adv

    def run_standard_evaluation_individual(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        *,
        batch_size: int | None = None,
    ) -> dict[str, Tensor] | dict[str, tuple[Tensor, Tensor]]:
        """Every attack on its own against all images: name → x_adv, or (x_adv, labels) as above."""
        size = bs if batch_size is None else batch_size
        each = {m.name: self._run(x_orig, y_orig, size, [m], None) for m in self.members()}
        if return_labels or batch_size is not None:
            return {name: (x_adv, self._predict(x_adv, size)) for name, x_adv in each.items()}
        return each

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The fraction classified correctly."""
        accuracy = float((self._predict(x_orig, bs) == y_orig).float().mean())
        self._log(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def _run(self, x: Tensor, y: Tensor, size: int, members: list[Member], state_path: str | Path | None) -> Tensor:
        self._log(f"using {self.version} version including {', '.join(member.name for member in members)}.")
        verdicts = evaluate(
            self.model,
            x,
            y,
            Threat(NORMS[self.norm], self.epsilon),  # type: ignore[arg-type]
            attacks=members,
            seed=self._seed(state_path),
            batch_size=size,
            precision=self.precision,
            device=self.device,
            state=state_path,
            examples=True,
        )
        self.verdicts = verdicts
        left, seconds = verdicts.after_each(), 0.0
        for item in verdicts.spent:
            seconds += item.seconds
            if item.attack in left:
                what = "initial accuracy" if item.attack == "clean" else f"robust accuracy after {item.attack.upper()}"
                self._log(f"{what}: {left[item.attack]:.2%} (total time {seconds:.1f} s)")
        for finding in verdicts.findings:
            self._log(f"Warning: {finding.message} [{finding.name}]. {finding.advice}")
        self._log(f"robust accuracy: {verdicts.robust_accuracy:.2%}")
        x_adv = x.clone()
        examples = verdicts.examples
        assert examples is not None
        x_adv[torch.from_numpy(examples.index).to(x.device)] = torch.from_numpy(examples.x_adv).to(x.device)
        return x_adv

    def _seed(self, state_path: str | Path | None) -> int:
        """`seed`; where that is None, that of the state, else the clock."""
        if state_path is None:
            return self.get_seed()
        folder = Path(state_path)
        if folder.is_file():
            raise InputError(f"state_path = {str(folder)!r} is a file (allowed: a folder, new or of an earlier run)")
        seed = identity_of_state(folder).get("seed") if self.seed is None else None
        return self.get_seed() if seed is None else seed

    def _predict(self, x: Tensor, size: int) -> Tensor:
        with frozen(self.model):
            victim = Victim(self.model, most=size)
            parts = range(0, len(x), size)
            return torch.cat([victim.logits(x[i : i + size].to(self.device)).argmax(1) for i in parts]).to(x.device)

    def _log(self, text: str) -> None:
        if self.verbose:
            print(text)
        if self.log_path is not None:
            with Path(self.log_path).open("a", encoding="utf-8") as log:
                log.write(text + "\n")
