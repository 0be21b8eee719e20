"""What a person runs, runs: the demo, and every example, in an empty folder."""

import re

import pytest

import analyzer_demo
import examples
import families


def test_the_demo_tells_its_story(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["analyzer_demo.py"])
    analyzer_demo.main()
    first = capsys.readouterr().out
    assert "12 layers" in first
    assert "FAILED" not in first
    assert re.search(r"From layer \S+ on, ' \w+' stays the best next token", first)
    assert re.search(r"HeadRanking\(induction: 4\.\d 0\.7", first)
    assert re.search(r"' France' \+\d", first), "the token that the answer stands on"
    for name in (
        "logit_lens.png", "convergence.png", "sums.png", "sums.safetensors", "logit_parts.png",
        "tokens.png", "attention.html",
    ):  # fmt: skip
        assert (tmp_path / "out" / name).stat().st_size > 5000, name


def test_the_demo_takes_another_model_and_prompt(tmp_path, monkeypatch, capsys):
    model, tokenizer = families.build("llama"), families.tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["analyzer_demo.py", "model", "the cat sat", "--other", "the dog"]
    )
    analyzer_demo.main()
    assert "LlamaForCausalLM, 3 layers" in capsys.readouterr().out


# Four words are few points for t-SNE, and the reader is told so.
@pytest.mark.filterwarnings("default:perplexity")
@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_every_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples.main([name])
    assert f"=== {name}" in capsys.readouterr().out


def test_an_unknown_example_is_named():
    with pytest.raises(SystemExit, match="no example 'nope'; there are model_inspection"):
        examples.main(["nope"])
