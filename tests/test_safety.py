"""Nothing here runs what a stranger wrote: not from a message, not from a model's files."""

import ast
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from tpu_mini_sglang.models.hub import load_model_config
from tpu_mini_sglang.tokenizer import TemplateError, TextError, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "tpu_mini_sglang").rglob("*.py"))
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "torch",
    "code",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> list[str]:
    """Imports and calls that could run foreign code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            found += [node.func.id] if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS else []
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", True)  # anything but a literal False could be true
                if keyword.arg in ("trust_remote_code", "allow_pickle") and value is not False:
                    found.append(keyword.arg)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_can_run_foreign_code(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch.serialization",
        "eval('1')",
        "np.load(f, allow_pickle=True)",
        "f(trust_remote_code=flag)",
    ],
)
def test_the_test_sees_it(source: str) -> None:
    assert len(offences(source)) == 1


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
}


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_code_in_a_model_s_folder_is_never_run(tmp_path: Path) -> None:
    mark, folder = tmp_path / "it-ran", tmp_path / "model"
    folder.mkdir()
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w')\nTrap = None\n")
    save_tokenizer(folder)
    auto = {"auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
    (folder / "config.json").write_text(json.dumps(CONFIG | auto))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["trap.Trap", None]}}))
    assert load_model_config(folder).hidden_size == 16
    assert load_tokenizer(folder).encode("b") == [1]
    assert not mark.exists()


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for template in ("{{ messages.__class__.__mro__[1] }}", "{% for i in range(10**9) %}a{% endfor %}"):
        (tmp_path / "chat.jinja").write_text(template)
        tokenizer = load_tokenizer(tmp_path, tmp_path / "chat.jinja")
        with pytest.raises((TemplateError, TextError)):
            tokenizer.apply_chat_template([{"role": "user", "content": "b"}])
