"""Text directions with a small CLIP of random weights, saved to a folder as published ones are."""

import json

import pytest
import torch

from mambastyle import checkpoints
from mambastyle.features.clip import Clip
from mambastyle.latents import text as texts
from mambastyle.latents.directions import Directions
from mambastyle.models.stylegan2 import Generator
from mambastyle.published.directions import StyleClipGlobal
from mambastyle.training.text_directions import text_direction


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """CLIP's own files: config, safetensors, and a tokenizer whose merges are none."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = sizes | ends | {"vocab_size": len(words), "max_position_embeddings": 40}
    torch.manual_seed(0)
    vision = sizes | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder) -> Clip:
    return Clip(clip_folder)


@pytest.fixture(scope="module")
def generator(tiny_model_folder) -> Generator:
    checkpoint = checkpoints.load(tiny_model_folder / "generator.safetensors")
    return Generator.from_checkpoint(checkpoint)


def test_clip_embeds_texts_and_pictures_as_transformers_does(clip, clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    image = torch.rand(2, 3, 16, 16) * 2 - 1
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = ((image + 1) / 2 - clip.mean) / clip.std
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        ["a cat", "a dog!"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        whole = model(**tokens, pixel_values=pixels)
    torch.testing.assert_close(clip.text(["a cat", "a dog!"]), whole.text_embeds)
    torch.testing.assert_close(clip(image), whole.image_embeds)
    saturated = torch.ones(1, 3, 24, 20, requires_grad=True)
    clip(saturated)[0, 0].backward()
    assert saturated.grad is not None
    assert saturated.grad.abs().sum() > 0


def test_an_optimised_direction_moves_other_pictures_as_the_text_does(clip, generator):
    offset = texts.text_offset(clip.text, "a smiling person", "a person")
    torch.testing.assert_close(offset.norm(), torch.tensor(1.0))
    found = texts.optimise("smile", offset, generator, clip, steps=30, learning_rate=0.05, keep=0.01)
    ws = generator.mapping(torch.randn(32, 12, generator=torch.Generator().manual_seed(9)))

    def angle(direction: torch.Tensor) -> float:
        with torch.no_grad():
            moved = clip(generator.synthesis(ws + direction)) - clip(generator.synthesis(ws))
        return float(torch.cosine_similarity(moved, offset[None]).mean())

    random = torch.randn(found.vector.shape, generator=torch.Generator().manual_seed(1))
    assert angle(found.vector) > angle(random / random.norm() * found.vector.norm()) + 0.1
    assert angle(found.vector) > 0.1
    with pytest.raises(ValueError, match="no difference between 'a cat' and 'a cat'"):
        texts.text_offset(clip.text, "a cat", "a cat")


@pytest.mark.no_shape_checks
def test_the_table_of_a_generator_says_what_each_style_channel_changes(clip, generator):
    table = texts.relevance(generator, clip, samples=2, batch=2)
    affines = texts.style_affines(generator)
    assert table.shape == (sum(len(affine.weight) for affine in affines), 12)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(len(table)))
    # The text of a channel's own change asks for that channel before all others.
    styles = StyleClipGlobal(table).styles(table[5], threshold=0.0)
    assert styles.argmax() == 5
    assert generator.synthesis.blocks[0].conv1.affine._forward_hooks == {}


def test_the_command_writes_and_adds_directions(
    clip_folder, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    import sys

    from mambastyle.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mambastyle", "directions", "text", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        streams = capsys.readouterr()
        return int(stopped.value.code or 0), streams.out, streams.err

    out = tmp_path / "text.safetensors"
    shared = ("-m", tiny_model_folder, "--clip", clip_folder, "--device", "cpu")
    assert run("a person with glasses", out, *shared, "--steps", 2)[0] == 0
    arguments = ("old person", out, *shared, "--method", "global", "--samples", 1, "--threshold", 0)
    assert run(*arguments)[:2] == (0, f"old-person written to {out} (2 directions)\n")
    found = Directions.load(out)
    assert list(found) == ["a-person-with-glasses", "old-person"]
    assert found.generator == checkpoints.read_header(tiny_model_folder / "generator.safetensors").sha256
    code, _, error = run("old", out, "-m", tiny_model_folder, "--clip", tmp_path)
    assert (code, "lacks config.json, model.safetensors" in error) == (1, True)


def test_an_unknown_method_and_a_file_that_is_no_table_are_refused(clip_folder, tiny_model_folder):
    with pytest.raises(ValueError, match="expected the method optimise or global, got 'guess'"):
        text_direction(tiny_model_folder, "x", clip=clip_folder, method="guess")  # type: ignore[arg-type]
    table = tiny_model_folder / "directions.safetensors"
    with pytest.raises(ValueError, match=r"no known kind|no table of StyleCLIP"):
        text_direction(tiny_model_folder, "x", clip=clip_folder, method="global", table=table)
