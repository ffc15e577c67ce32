"""A language model as EleutherAI's lm-evaluation-harness (lm-eval 0.4.13 and newer) asks for one.

Importing this module needs lm-eval, the extra ``eval``.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from pallas_kernels.errors import RequestError
from sparse_lm.generate import GREEDY, Sampling
from sparse_lm.generate_until import TextTokenizer, generate_until
from sparse_lm.inference import InferenceModel
from sparse_lm.model import SparseLM
from sparse_lm.scoring import rolling_windows, score

TASKS = Path(__file__).parent / "tasks"
"""Task files of ours: CommonsenseQA in cloze form."""
PAPER_TASKS = (
    "arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "commonsenseqa",
)  # fmt: skip
"""The seven tasks of arXiv 2603.23198."""
_DEFAULT_NEW_TOKENS = 256
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class SparseHarness(TemplateLM):
    """Scores and continues texts with a model; hand it to ``lm_eval.simple_evaluate(model=...)``.

    Args:
      model: the language model; of a `SparseLM` it keeps what inference needs.
      tokenizer: that it was trained with.
      batch_size: most texts of a batch; it changes no score.
    """

    def __init__(
        self, model: SparseLM | InferenceModel, tokenizer: TextTokenizer, *, batch_size: int = 32
    ) -> None:
        super().__init__()
        self._model = InferenceModel.of(model) if isinstance(model, SparseLM) else model
        self._tokenizer = tokenizer
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored behind."""
        return self._tokenizer.prefix_ids[0] if self._tokenizer.prefix_ids else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self._model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, behind those that its publisher puts before every text unless they are unwanted."""
        prefix = () if add_special_tokens is False else self._tokenizer.prefix_ids
        return [*prefix, *self._tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score(self._model, pairs, batch_size=self.batch_size)
        results = [(one.log_likelihood, one.is_greedy) for one in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = [rolling_windows(text, self.prefix_token_id, self.max_length) for text in texts]
        scores = iter(score(self._model, list(itertools.chain(*windows)), batch_size=self.batch_size))
        results = [sum(next(scores).log_likelihood for _ in parts) for parts in windows]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests with the same arguments are one batch.

        Raises:
          RequestError: arguments that this library does not know.
        """
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(at)
        for places in groups.values():
            continued = self._generation(requests[places[0]].args[1])
            texts = continued([requests[at].args[0] for at in places])
            for at, text in zip(places, texts, strict=True):
                results[at] = text
                self.cache_hook.add_partial("generate_until", requests[at].args, text)
        return results

    def _generation(self, arguments: dict[str, Any]) -> "functools.partial[list[str]]":
        """`generate_until` with the harness's arguments in our words."""
        given = dict(arguments)
        until = given.pop("until", None) or []
        numbers = [given.pop(name) for name in _NEW_TOKENS if name in given]
        temperature = float(given.pop("temperature", 0.0) or 0.0)
        sampled = given.pop("do_sample", temperature > 0)
        filters = {name: given.pop(name) for name in ("top_k", "top_p") if name in given}
        if given:
            raise RequestError(
                f"generation takes until, do_sample, temperature, top_k, top_p and {', '.join(_NEW_TOKENS)}; "
                f"got {', '.join(given)} in a task's generation_kwargs"
            )
        # As transformers does: sampling without a temperature has one of 1.
        sampling = Sampling(temperature or 1.0, **filters) if sampled else GREEDY
        default = min(_DEFAULT_NEW_TOKENS, self.max_length // 2)
        return functools.partial(
            generate_until,
            self._model,
            self._tokenizer,
            until=[until] if isinstance(until, str) else list(until),
            max_new_tokens=int(numbers[0]) if numbers else default,
            sampling=sampling,
            batch_size=self.batch_size,
        )


def task_paths(include_path: str | None = None) -> Sequence[str]:
    """Directories of task files besides the harness's own: ours, and the user's if there is one."""
    return [str(TASKS), *([include_path] if include_path else [])]
