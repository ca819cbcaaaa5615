"""The model class of lm-evaluation-harness: `lm_eval --model gptq_jax --model_args path=DIR`."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from gptq_jax.generate import Sampling, end_tokens, generate_tokens
from gptq_jax.harness.requests import Scored, cut_at, rolling_windows, split_pair
from gptq_jax.harness.scoring import score
from gptq_jax.models.base import Model
from gptq_jax.models.prepared import prepare
from gptq_jax.pipeline import is_quantized
from gptq_jax.storage.load import load

MAX_NEW_TOKENS = 256  # where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS}


@register_model("gptq_jax")
class HarnessModel(LM):
    """A model of this library, asked by the harness.

    Args:
        path: what `gptq_jax.load` takes; or a model.
        batch_size: requests that are scored at a time; texts are generated one by one.
        dtype: of a checkpoint's float parameters.
        arch_config: as for `load`.
        add_bos_token: start contexts with the token that starts a text; None: as the tokenizer does by itself.
        max_length: tokens of the model's context to use; None: all.
        seed: of generation that draws.
        device, max_batch_size: of the harness, for other models; JAX chooses the device.

    Raises:
        ValueError: the model is a module of one's own, or has no tokenizer.
    """

    def __init__(
        self,
        path: Any,
        batch_size: int | str | None = 8,
        dtype: str = "float32",
        arch_config: str | None = None,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        given = isinstance(path, Model)
        model = path if given else load(path, dtype=dtype, arch_config=arch_config)
        if not isinstance(model, Model):
            raise ValueError("the harness runs supplied architectures: a module of one's own is not known to it.")
        if model.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer, and tasks are texts.")
        self.model = prepare(model) if is_quantized(model) and not given else model
        self.tokenizer = model.tokenizer
        self.batch_size = _batch_size(batch_size)
        self.add_bos_token = add_bos_token
        context = model.config.context_length
        if max_length is not None and not 2 <= max_length <= context:
            raise ValueError(f"max_length={max_length} must be at least 2 and at most the model's {context}.")
        self.max_length = max_length or context
        self.seed = seed

    @property
    def prefix_token(self) -> int:
        """What a text without context follows: the token that starts texts, or else one that ends them."""
        token = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise ValueError("the tokenizer has neither a first nor a last token, to score a text without context.")
        return token

    def encode(self, text: str) -> list[int]:
        """Text -> tokens, with what starts a text, unless the text itself begins so."""
        bos = self.tokenizer.bos_token
        if self.add_bos_token is None and not (bos and text.startswith(bos)):
            return self.tokenizer(text, verbose=False)["input_ids"]
        special = bool(self.add_bos_token) and not (bos and text.startswith(bos))
        return self.tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether greedy decoding gives it."""
        pairs = [request.args for request in requests]
        scored = [
            split_pair(context, text, self.encode, self._encode_bare, self.prefix_token) for context, text in pairs
        ]
        keep = self.cache_hook.add_partial
        return self._score(scored, disable_tqdm, lambda row, found: keep("loglikelihood", pairs[row], found))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each text: its log-likelihood, every token counted once."""
        texts = [request.args[0] for request in requests]
        windows = [
            (text, window)
            for text, string in enumerate(texts)
            for window in rolling_windows(self.encode(string), self.prefix_token, self.max_length)
        ]
        totals = [0.0] * len(texts)
        found = self._score([window for _, window in windows], disable_tqdm)
        for (text, _), (log_likelihood, _) in zip(windows, found, strict=True):
            totals[text] += log_likelihood
        for string, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options): what follows, up to the first of the strings `until`."""
        from tqdm import tqdm

        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generating"):
            context, options = request.args
            texts.append(self._generate(context, options))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that the tokenizer makes of a conversation."""
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: run the tasks without --apply_chat_template.")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the harness's record."""
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _encode_bare(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    def _score(
        self,
        requests: Sequence[Scored],
        disable_tqdm: bool,
        on_result: Callable[[int, tuple[float, bool]], None] = lambda row, found: None,
    ) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        found: dict[int, tuple[float, bool]] = {}
        results = score(self.model, requests, batch_size=self.batch_size, context_length=self.max_length)
        for row, log_likelihood, greedy in tqdm(results, total=len(requests), disable=disable_tqdm, desc="scoring"):
            found[row] = log_likelihood, greedy
            on_result(row, found[row])
        return [found[row] for row in range(len(requests))]

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        if unknown := sorted(set(options) - _KNOWN):
            raise ValueError(f"generation options {unknown} are not supported: use {sorted(_KNOWN)}.")
        stops = _stops(options.get("until"))
        lengths = [int(options[name]) for name in _LENGTHS if options.get(name) is not None]
        new_tokens = lengths[0] if lengths else MAX_NEW_TOKENS
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"a task asks for {new_tokens} new tokens, which leaves no context of the model's {self.max_length}: "
                "set max_gen_toks in its generation_kwargs."
            )
        prompt = (self.encode(context) or [self.prefix_token])[-room:]
        tokens: list[int] = []
        stream = generate_tokens(
            self.model,
            prompt,
            max_new_tokens=new_tokens,
            sampling=_sampling(options, self.seed),
            stop_tokens=end_tokens(self.model),
        )

        def no_stop(token: int) -> bool:
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return cut_at(text, stops) == text

        for _ in takewhile(no_stop, stream):
            pass
        return cut_at(self.tokenizer.decode(tokens, skip_special_tokens=True), stops)


def _batch_size(batch_size: int | str | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return 8
    found = int(batch_size)
    if found < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    return found


def _stops(until: Any) -> list[str]:
    return [until] if isinstance(until, str) else list(until or ())


def _sampling(options: Mapping[str, Any], seed: int) -> Sampling:
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    elif options.get("do_sample") and not temperature:
        temperature = 1.0
    if not temperature:
        return Sampling()
    return Sampling(temperature=temperature, top_k=options.get("top_k"), top_p=options.get("top_p"), seed=seed)
