"""Tiny seeded models of transformers, and what many tests do with a model."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loradrop
from loradrop import LoRAConfig
from loradrop.injection import injection_of

Make, Options = Callable[[], Any], dict[str, Any]
IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(5))
LM = {"num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}


def build(cls: str, config: str, **sizes: Any) -> Any:
    import transformers  # here: the processes of a test without it need not load it

    torch.manual_seed(0)
    common = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    common["initializer_range"] = 0.2  # for logits that an adapter moves
    made = getattr(transformers, config)(**common | sizes)
    return getattr(transformers, cls)(made).eval()


def bert(
    layers: int = 3, hidden: int = 32, cls: str = "ForSequenceClassification", **kw: Any
) -> Any:
    sizes = {"intermediate_size": 48, "max_position_embeddings": 32, **kw}
    return build(f"Bert{cls}", "BertConfig", num_hidden_layers=layers, hidden_size=hidden, **sizes)


def roberta() -> Any:
    sizes = dict(intermediate_size=48, max_position_embeddings=40)
    return build("RobertaForSequenceClassification", "RobertaConfig", **sizes)


def distilbert() -> Any:
    return build("DistilBertForSequenceClassification", "DistilBertConfig", hidden_dim=48)


def llama(cls: str = "ForCausalLM", **options: Any) -> Any:
    sizes = dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=32)
    return build(f"Llama{cls}", "LlamaConfig", **sizes | LM | options)


def deepseek() -> Any:
    """A first layer without experts, a second one with some that are shared."""
    sizes = dict(intermediate_size=48, num_key_value_heads=4, moe_intermediate_size=16)
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
    routing = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    sizes |= dict(v_head_dim=8, first_k_dense_replace=1, max_position_embeddings=32)
    return build("DeepseekV3ForCausalLM", "DeepseekV3Config", **sizes | heads | routing | LM)


def gpt2() -> Any:
    return build("GPT2LMHeadModel", "GPT2Config", n_positions=32, **LM)


def t5(cls: str = "T5ForConditionalGeneration") -> Any:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return build(cls, "T5Config", **sizes)


def llava() -> Any:
    """A language model beside one that reads pictures."""
    text = dict(model_type="llama", vocab_size=50, hidden_size=32, num_attention_heads=4)
    sizes = dict(intermediate_size=48, num_hidden_layers=2, initializer_range=0.2)
    vision = dict(model_type="clip_vision_model", hidden_size=32, num_attention_heads=4)
    configs = dict(text_config=text | sizes, vision_config=vision | sizes | dict(image_size=16))
    configs["vision_config"]["patch_size"] = 8
    return build("LlavaForConditionalGeneration", "LlavaConfig", image_token_id=1, **configs)


def words(count: int = 50) -> Any:
    """A tokenizer of numbers: "3" is token 3, 0 pads and 1 ends."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    known = {"[PAD]": 0, "[EOS]": 1} | {str(i): i for i in range(2, count)}
    tokenizer = Tokenizer(WordLevel(known, "[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def wake(model: Any, size: float = 1.0) -> Any:
    """B away from zero, as after some training."""
    generator = torch.Generator().manual_seed(1)
    for B in model.lora_bank.B:
        B.data.copy_(torch.randn(B.shape, generator=generator) * size)
    return model


def fill(model: Any, seed: int = 1) -> Any:
    """Give every trained tensor a value that shows in the logits."""
    state, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    whole = [state[name] for name in injection_of(model).originals]
    for tensor in (*model.lora_bank.parameters(), *whole):
        tensor.data.add_((torch.randn(tensor.shape, generator=generator) * 0.3).to(tensor.dtype))
    return model


def adapt(model: nn.Module, config: LoRAConfig | None = None, **options: Any) -> Any:
    loradrop.inject(model, config or LoRAConfig(**options))
    return fill(model)


def share(model: Any, kept: list[int], how: str = "group") -> Any:
    """Keep these targets an adapter of their own."""
    loradrop.share(model, [model.lora_bank.targets[i].name for i in kept], share=how)
    return fill(model, 2)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """In float64: two models then differ by the rounding of a file, not by a machine's sums."""
    named = copy.deepcopy(model).double()(input_ids=IDS)
    return torch.cat([v.flatten() for v in named.values() if isinstance(v, Tensor)])


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must be as before where a model is left, or brought back, as it was."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "identity": {k: id(p) for k, p in model.named_parameters()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "hooks": {k: len(m._forward_hooks) for k, m in model.named_modules()},
        "attributes": {k: set(m.__dict__) for k, m in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    states = after.pop("state"), before["state"]
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    for what, value in after.items():
        assert value == before[what], what


# A model of its own: two layers whose targets are query and value

WIDTH, R, VOCABULARY = 12, 3, 20


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.query(x)) * self.value(x))


class Net(nn.Module):
    """From ids or embeddings; `reentrant` turns on activation checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers, self.reentrant = nn.ModuleList([Layer(), Layer()]), reentrant

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = input_ids if input_ids.is_floating_point() else self.embed(input_ids)
        if self.reentrant and not x.requires_grad:
            x = x.detach().requires_grad_()
        again = functools.partial(checkpoint, use_reentrant=self.reentrant)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else again(layer, x)
        return x


def net(reentrant: bool | None = None, **options: Any) -> Any:
    """A `Net` with adapters that are awake."""
    model = Net(reentrant)
    targets = ["query", "value"]
    loradrop.inject(model, LoRAConfig(r=R, lora_alpha=4, target_modules=targets, **options))
    return wake(model)
