"""Words at positions, for the tokenizers of SD 1, SDXL, SD3 and Flux and whatever text holds."""

import pytest
from comfyui import newest, pack

pytestmark = pytest.mark.comfy
TEXT = (
    "a (red fox:1.3) jumps, ((very)) high \\(really\\) :) (unclosed naïve 日本 [x] "
    "supercalifragilistic"
)
WORDS = ("a", "red", "fox", "jumps,", "very", "high", "\\(really\\)", ":)", "(unclosed", "naïve",
         "日本", "[x]", "supercalifragilistic")  # fmt: skip


def tokenizer(kind: str, folder: str | None = None):
    """Return the tokenizer of a text encoder; they come with ComfyUI, without weights."""
    from comfy.sd1_clip import SD1Tokenizer
    from comfy.sdxl_clip import SDXLTokenizer
    from comfy.text_encoders.flux import FluxTokenizer
    from comfy.text_encoders.sd3_clip import SD3Tokenizer

    kinds = {"sd1": SD1Tokenizer, "sdxl": SDXLTokenizer, "sd3": SD3Tokenizer, "flux": FluxTokenizer}
    return kinds[kind](embedding_directory=folder)


def read(kind: str, text: str, encoders: list, folder: str | None = None) -> dict:
    """Return the words of a prompt and the word at each position, as ComfyUI would encode it."""
    theirs = tokenizer(kind, folder)
    chunks = theirs.tokenize_with_weights(text)
    positions = sum(len(chunk) for name in encoders for chunk in chunks[name])
    explaining = pack("nodes.engine.explaining")
    words, weights = explaining.prompt_words(theirs, text)
    found = explaining.read_tokens(theirs, text, words, positions)
    assert len(found) == positions
    tokens = [[token.text, token.word] for token in found]
    return {"words": words, "weights": weights, "tokens": tokens}


def pieces(found: dict, word: str) -> list[str]:
    index = found["words"].index(word)
    return [text for text, owner in found["tokens"] if owner == index]


LAYOUTS = [("sd1", ["l"]), ("sdxl", ["g"]), ("sd3", ["l", "t5xxl"]), ("sd3", ["l"]),
           ("flux", ["t5xxl"])]  # fmt: skip


@pytest.mark.parametrize(("kind", "encoders"), LAYOUTS)
def test_every_word_has_its_own_pieces(comfy, kind, encoders):
    found = comfy.call(read, kind, TEXT, encoders)
    assert found["words"] == WORDS
    assert found["weights"][:6] == pytest.approx((1, 1.3, 1.3, 1, 1.21, 1))
    for word in ("a", "red", "fox", "very", "high", "(unclosed", "supercalifragilistic"):
        assert "".join(pieces(found, word)) == word * len(encoders)
    assert set(range(len(WORDS))) <= {owner for _, owner in found["tokens"]}


@pytest.mark.parametrize(("kind", "encoders"), LAYOUTS)
def test_long_prompts_are_read_to_the_end(comfy, kind, encoders):
    words = [f"word{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(200)]
    found = comfy.call(read, kind, " ".join(words), encoders)
    assert found["words"] == tuple(words)
    for word in words:
        assert "".join(pieces(found, word)) == word * len(encoders)


def test_embeddings_are_one_word_of_several_positions(comfy, tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"emb_params": zeros(3, 768)}, tmp_path / "foo.safetensors")
    found = comfy.call(read, "sd1", "a embedding:foo, cat", ["l"], str(tmp_path))
    assert found["words"] == ("a", "embedding:foo,", "cat")
    assert pieces(found, "embedding:foo,") == ["", "", "", ","]
    assert pieces(found, "cat") == ["cat"]


def test_a_layout_that_is_not_known_is_refused(comfy):
    with pytest.raises(AssertionError, match="it is not known which word stands where"):
        comfy.call(refused)


def refused() -> None:
    pack("nodes.engine.explaining").read_tokens(tokenizer("sd1"), "a cat", ("a", "cat"), 5)


def language_model() -> dict:
    """Return what is read of a prompt by a tokenizer with a chat template around it."""
    from comfy.text_encoders.z_image import ZImageTokenizer

    explaining, theirs = pack("nodes.engine.explaining"), ZImageTokenizer()
    words, weights = explaining.prompt_words(theirs, "a (red fox:1.3), <|im_end|> user")
    try:
        explaining.read_tokens(theirs, "a cat", ("a", "cat"), 12)
    except ValueError as error:
        return {"words": words, "weights": weights, "refusal": str(error)}
    raise AssertionError("the template's tokens would be taken for words")


@newest
def test_a_chat_template_adds_no_words(comfy):
    found = comfy.call(language_model)
    # Its weights are switched off: the parentheses are text.
    assert found["words"] == ("a", "(red", "fox:1.3),", "<|im_end|>", "user")
    assert set(found["weights"]) == {1.0}
    assert "Choose the method leave_out" in found["refusal"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a (:1.3) cat", "a  cat"), ("((  :1.2)), x", ", x"), ("a (b) (c:1)", "a (b) (c:1)"),
     (":) (unclosed", ":) (unclosed")],
)  # fmt: skip
def test_weights_that_nothing_bears_go_with_their_word(comfy, text, expected):
    assert comfy.call(tidied, text) == expected


def tidied(text: str) -> str:
    return pack("nodes.engine.explaining").tidy(text)
