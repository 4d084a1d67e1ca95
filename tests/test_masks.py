"""Masks of tokens: which rows of a target's input they are."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from models import build, t5, wake
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import loradrop
from loradrop.scores import Target
from loradrop.statistics.collector import Collector
from loradrop.statistics.masks import Masking, TokenMasks, fitted

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(2))
REAL = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
LABELS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((2, 3), MASK),
        ((3, 2), MASK.T),
        ((6,), MASK.flatten()),
        ((1, 6), None),  # DeBERTa's relative positions
        ((2, 2), None),
        ((2,), None),
        ((4, 3), None),
    ],
)
def test_rows_of_a_mask(rows: tuple[int, ...], expected: Tensor | None) -> None:
    found = fitted(MASK, rows)
    assert (found is None) == (expected is None)
    assert expected is None or (found is not None and torch.equal(found, expected))


def test_a_cache_leaves_the_last_tokens() -> None:
    found = fitted(MASK, (2, 1), cached=True)
    assert found is not None and torch.equal(found, MASK[:, -1:])


def test_as_many_rows_as_tokens() -> None:
    square = torch.tensor([[1, 1], [0, 0]])
    for transposed, expected in ((False, square), (True, square.T)):
        found = fitted(square, (2, 2), transposed=transposed)
        assert found is not None and torch.equal(found, expected)


@pytest.mark.parametrize("given", [MASK, MASK.bool(), 0.5 * MASK], ids=["int64", "bool", "float32"])
def test_a_mask_is_made_numbers_once_a_pass(given: Tensor) -> None:
    """Not in every layer, where it would be one more launch; `mask_fn` sees it as it came."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    targets = [Target("0", "0", 4, 4, 2), Target("1", "1", 4, 4, 2)]
    masks = TokenMasks(model, targets, Masking())
    masks.enter((), {"attention_mask": given})
    found = [target.weights(torch.zeros(2, 3, 4)) for target in masks.of_targets]
    assert masks.current is given and len({one.data_ptr() for one in found}) == 1
    assert found[0].dtype == torch.float32 and torch.equal(found[0], given.float())


def test_a_mask_of_no_input_is_named() -> None:
    model = t5("T5EncoderModel")
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["q"]))
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(ValueError, match=r"mask='attention_msk'.*name, but attention_mask\."):
        loradrop.probe(model, [batch], mask="attention_msk")
    assert loradrop.probe(model, [batch], mask=None).tokens == IDS.numel()


def test_a_mask_that_numbers_packed_sequences() -> None:
    """Each token counts once, whatever the number of its sequence is."""
    model = t5("T5EncoderModel")
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["q"]))
    wake(model)
    packed = torch.tensor([[1, 1, 2, 2, 3, 0], [1, 2, 3, 4, 5, 6]])
    model.forward = partial(masked_by_ones, model, type(model).forward)
    found = [
        loradrop.probe(model, [{"input_ids": IDS, "attention_mask": mask}])
        for mask in (packed, (packed > 0).long())
    ]
    assert dict(found[0]) == dict(found[1]) and found[0].tokens == found[1].tokens == 11


def masked_by_ones(model: Any, forward: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """As a model does that keeps packed sequences apart: the mask's numbers do not add up."""
    return forward(model, input_ids, attention_mask=(attention_mask > 0).long())


class Below(torch.nn.Module):
    """Has its body called by others, as a loss of one's own calls `model.bert`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forward_pass_that_does_not_begin_at_the_model(
    checkpointed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no mask, neither none without a word nor that of the pass before it."""
    model = Below()
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules="all-linear"))
    wake(model)
    x, mask = torch.ones(2, 3, 4), torch.tensor([[1, 0, 0], [0, 0, 0]])

    def score(*, whole: bool, body: bool) -> float:
        collector = Collector(model, model.lora_bank, online=True)
        y = model(x, mask) if whole else x
        if body:
            again = partial(checkpoint, use_reentrant=False) if checkpointed else lambda f, x: f(x)
            y = again(model.body, x)
        y.sum().backward()
        collector.close_row()
        collector.detach()
        return collector.scores()["body.0"]

    every = score(whole=False, body=True)
    assert every == pytest.approx(6 * score(whole=True, body=False))
    if checkpointed:  # whose recomputation it is nobody knows
        with pytest.raises(RuntimeError, match="recomputed after several forward passes"):
            score(whole=True, body=True)
    else:
        assert score(whole=True, body=True) == every
    said = "body.0 ran outside of the model's own forward, as in model.bert(...), so it is not"
    assert caplog.text.count(said) == 2


def test_a_mask_function_knows_forward_passes_that_do_not_begin_at_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, seen = Below(), []
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules="all-linear"))
    own = Masking(mask_fn=lambda name, x, mask: seen.append(mask))
    collector = Collector(model, model.lora_bank, online=True, masking=own)
    model(torch.ones(2, 3, 4), torch.ones(2, 3))
    model.body(torch.ones(2, 3, 4))
    collector.detach()
    assert [mask is None for mask in seen] == [False] * 2 + [True] * 2
    assert "ran outside" not in caplog.text


def test_a_mask_of_pairs_is_not_one_of_tokens() -> None:
    assert fitted(torch.ones(2, 1, 3, 3), (2, 3)) is None
    assert fitted(torch.ones(1, 1, 1, 6), (2, 3)) is None


def bart() -> Any:
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, decoder_start_token_id=2)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32)
    return build("BartForConditionalGeneration", "BartConfig", **sizes)


def wake_all(model: Any, names: list[str]) -> None:
    for B in loradrop.inject(model, loradrop.LoRAConfig(r=4, lora_alpha=4, target_modules=names)).B:
        torch.nn.init.normal_(B)


def probed(model: Any, **inputs: Tensor) -> loradrop.Scores:
    return loradrop.probe(model, [{"input_ids": IDS, "labels": LABELS, **inputs}])


@pytest.mark.parametrize("make", [bart, t5])
def test_the_decoder_has_tokens_of_its_own(make: Any) -> None:
    """Both sides have six tokens a row, so that shapes alone say nothing."""
    model = make().double()
    names = ["q", "k", "v"] if make is t5 else ["q_proj", "k_proj", "v_proj"]
    bank = loradrop.inject(model, loradrop.LoRAConfig(r=4, lora_alpha=4, target_modules=names))
    for B in bank.B:
        torch.nn.init.normal_(B)
    every = probed(model)
    plain = probed(model, attention_mask=torch.ones_like(REAL))
    assert dict(plain) == pytest.approx(dict(every), rel=1e-9)
    decoder = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    masks: dict[str, Tensor] = {"attention_mask": REAL, "decoder_attention_mask": decoder}
    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, mask: Tensor | None) -> None:
        seen[name] = x.detach().clone()

    loradrop.probe(model, [{"input_ids": IDS, "labels": LABELS, **masks}], mask_fn=note)
    scores = probed(model, **masks)
    crossed = 0
    for i, target in enumerate(bank.targets):
        A, B = bank.factors(i)
        norms = (seen[target.name] @ A.double().T @ B.double().T).square().sum(-1).detach()
        cross = any(part in target.name for part in ("encoder_attn", "EncDecAttention"))
        of_encoder = not target.name.startswith(("decoder", "model.decoder"))
        crossed += cross and not target.kind.startswith("q")
        mask = REAL if of_encoder or (cross and not target.kind.startswith("q")) else decoder
        assert scores[target.name] == pytest.approx(float((norms * mask).sum()), rel=1e-6)
    assert crossed == 4


WAYS = [(bart, "labels"), (bart, "ids"), (bart, "nothing"), (t5, "labels"), (t5, "ids")]


@pytest.mark.parametrize(("make", "given"), WAYS)
def test_a_decoder_without_a_mask_leaves_out_its_padding(make: Any, given: str) -> None:
    """As collators leave it: with labels, of which one in between does not count, or with what the
    decoder reads, where labels are smoothed; and some decoders read the encoder's tokens.
    """
    model = make().double()
    names = ["q", "k", "v"] if make is t5 else ["q_proj", "k_proj", "v_proj"]
    for B in loradrop.inject(model, loradrop.LoRAConfig(r=4, target_modules=names)).B:
        torch.nn.init.normal_(B)
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    labels = torch.where(real > 0, LABELS, -100)
    labels[0, 2] = -100
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    ids = torch.where(real > 0, torch.cat([torch.full((2, 1), start), LABELS[:, :-1]], 1), pad)
    batch: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": REAL}
    batch |= {"labels": {"labels": labels}, "ids": {"decoder_input_ids": ids}}.get(given, {})
    if given == "nothing":
        real = torch.cat([torch.ones(2, 1), REAL[:, :-1]], 1)
    found = loradrop.probe(model, [batch])
    wanted = loradrop.probe(model, [batch | {"decoder_attention_mask": real}])
    assert dict(found) == pytest.approx(dict(wanted), rel=1e-9)
    every = loradrop.probe(model, [batch | {"decoder_attention_mask": torch.ones(2, 6)}])
    assert max(every[name] / found[name] for name in found) > 1.2


def test_a_part_for_images_has_no_mask_of_the_text() -> None:
    """Also where the image has as many patches as the text has tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes["intermediate_size"] = 48
    image = {**sizes, "image_size": 24, "patch_size": 8}  # 9 patches, and the class
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 32, "eos_token_id": 2}
    model = build("CLIPModel", "CLIPConfig", text_config=text, vision_config=image)
    wake_all(model, ["q_proj", "v_proj"])
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def found(tokens: int) -> loradrop.Scores:
        ids = torch.nn.functional.pad(IDS, (0, tokens - 6))
        mask = torch.nn.functional.pad(REAL, (0, tokens - 6))
        batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        return loradrop.probe(model, [batch])

    assert dict(found(10)) == pytest.approx(dict(found(12)), rel=1e-4)


def test_relative_positions_are_no_tokens() -> None:
    """DeBERTa's (1, 2·span) of them, also where a batch has as many tokens."""
    sizes = {"intermediate_size": 48, "max_position_embeddings": 32, "type_vocab_size": 0}
    sizes |= {"position_buckets": 6, "relative_attention": True, "share_att_key": True}
    sizes |= {"pos_att_type": "p2c|c2p", "position_biased_input": False}
    model = build("DebertaV2Model", "DebertaV2Config", **sizes)
    wake_all(model, ["query_proj", "key_proj"])
    seen = set[tuple[int, ...]]()
    key = model.encoder.layer[0].attention.self.key_proj
    key.register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape[:-1])))
    short = loradrop.probe(model, [{"input_ids": IDS, "attention_mask": REAL}])
    assert seen == {(2, 6), (1, 12)}
    longer = [torch.nn.functional.pad(of, (0, 1)) for of in (IDS, REAL)]
    long = loradrop.probe(model, [{"input_ids": longer[0], "attention_mask": longer[1]}])
    assert dict(short) == pytest.approx(dict(long), rel=1e-4)


def test_between_encoder_and_decoder_are_the_encoder_s_tokens() -> None:
    sizes = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes["intermediate_size"] = 48
    encoder = transformers.BertConfig(hidden_size=32, **sizes)
    decoder = transformers.BertConfig(
        hidden_size=16, is_decoder=True, add_cross_attention=True, **sizes
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).eval()
    wake_all(model, ["enc_to_dec_proj"])
    masks = {"attention_mask": REAL, "decoder_attention_mask": torch.ones_like(REAL)}
    found = probed(model, **masks)["enc_to_dec_proj"]
    rows: list[Tensor] = []
    model.enc_to_dec_proj.register_forward_hook(lambda _, args, y: rows.append(args[0]))
    probed(model, **masks)
    (A,), (B,) = model.lora_bank.A, model.lora_bank.B
    norms = (rows[0] @ A.T @ B.T).square().sum(-1)
    assert found == pytest.approx(float((norms * REAL).sum()), rel=1e-4)


def test_a_pooler_counts_whole_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    sizes = dict(intermediate_size=48, max_position_embeddings=32)
    model = build("BertModel", "BertConfig", **sizes)
    bank = loradrop.inject(model, loradrop.LoRAConfig(r=4, target_modules="all-linear"))
    for B in bank.B:
        torch.nn.init.normal_(B)
    with caplog.at_level(logging.WARNING, "loradrop"):
        batch = {"input_ids": IDS, "attention_mask": REAL}
        scores = loradrop.probe(model, [batch, batch])
    assert scores["pooler.dense"] > 0
    assert [r.getMessage() for r in caplog.records if "pooler" in r.getMessage()] == [
        "'attention_mask' is (2, 6), the input of pooler.dense (2, 32): the rows are not those "
        "tokens, so all of them count. mask_fn= weighs them"
    ]


def test_a_batch_that_is_one_input() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lin = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return self.lin(self.embed(features["input_ids"]))

    torch.manual_seed(0)
    model = Outer()
    bank = loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["lin"]))
    torch.nn.init.normal_(bank.B[0])
    features = {"input_ids": IDS, "attention_mask": REAL}
    scores = loradrop.probe(model, [(features,)])
    flat = {"input_ids": IDS[REAL.bool()][None]}
    assert scores.tokens == 5
    assert scores["lin"] == pytest.approx(loradrop.probe(model, [(flat,)])["lin"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (torch.zeros(2, 3, 5, dtype=torch.int64), 30),  # ids of several choices
        (torch.zeros(2, 3, 4), 6),  # embeddings
        (torch.zeros(2, 4), 2),
        (torch.zeros(2, 3, 5, 4), 2),  # images
    ],
)
def test_tokens_without_a_mask(given: Tensor, tokens: int) -> None:
    model = Below()
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules="all-linear"))
    collector = Collector(model, model.lora_bank, online=False, masking=Masking(None))
    model.forward = lambda x: x
    model(given)
    collector.close_row()
    collector.detach()
    assert collector.scores().tokens == tokens


def test_replicas_in_threads_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["0"], strict=False))
    replica = model._replicate_for_data_parallel()
    replica.__dict__["_modules"] = model._modules
    with pytest.raises(RuntimeError, match=r"DataParallel.*torchrun"):
        Collector(replica, model.lora_bank, online=False)
        replica(torch.ones(2, 4))
