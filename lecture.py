"""Turn weights from the lecture's own code into checkpoints of this project.

People who type along change names: ffwd becomes mlp, sa becomes attn. They forget bias=False, leave
out other biases, or have one matrix for all heads. torch.compile puts _orig_mod. before all names.
Many files have more than weights: characters, sizes, an optimizer. So we recognise a layer by its
place (in a block or outside) and its shape. Names only decide between layers of the same shape.
"""

import math
import re
from collections import Counter, defaultdict

import torch

# Our layers, and patterns for the lecture's: their shapes and names. The first that fits is taken.
# C is n_embd, n any other size. Names are in lower case, with "bias" at the end if there is one.
OUTSIDE = {
    "ln_f": "C: ",
    "position_embedding": r"\w+ C: .*(pos|time|pe\b)",
    "lm_head": r"\w+ C: .*(bias|head|out|logit|un_?emb|lin|fc|proj|class|decoder\b)",
    "token_embedding": r"\w+ C: ",
}
HEAD = {
    "query": r"[nC] C: (.*[^a-z])?w?(q|quer\w*)([^a-z]|$)",
    "key": r"[nC] C: (.*[^a-z])?w?(k|key\w*)([^a-z]|$)",
    "value": r"[nC] C: (.*[^a-z])?w?(v|val\w*)([^a-z]|$)",
}
BLOCK = {
    "ln2": r"C: .*(2|second|ff|feed|mlp|post|after|s\.1\b)",
    "ln1": "C: ",
    "attention.qkv": "3C C: ",
    "attention.proj": "C C: ",
    "feed_forward.up": "4C C: (?!.*c_fc)",  # after c_fc, GPT-2 and nanoGPT have no ReLU
    "feed_forward.down": "C 4C: ",
}
NAME = r"(?:(.*?(?<!heads)(?<!head)\.\d+)\.)?(.*)"  # blocks.0 or nothing, then the rest of a name
N_HEAD = r"(?i)(n|num)?_?(attention_|attn_)?heads?|h"  # what people call the number of heads


def convert(checkpoint, text, loss_of):
    """A checkpoint of ours, as a dict, and a line that says how well it fits the text.

    The checkpoint is a state_dict of the lecture's last model, or contains one. ValueError if it is
    another model, or if the text does not have its characters.
    """
    parts = list(walk(checkpoint))
    weights, biases = find_tensors(parts)
    layers = recognise(weights, biases)
    model = {}
    for ours, theirs in layers.items():
        zeros = [weights[name].new_zeros(len(weights[name])) for name in theirs]
        model[f"{ours}.weight"] = torch.cat([weights[name] for name in theirs])
        model[f"{ours}.bias"] = torch.cat(list(map(biases.get, theirs, zeros)))
    del model["token_embedding.bias"], model["position_embedding.bias"]
    if "ln_f" in layers and (model["ln_f.weight"] == 1).all() and not model["ln_f.bias"].any():
        del model["ln_f.weight"], model["ln_f.bias"]  # never trained, so the model did not use it
    V, C = model["token_embedding.weight"].shape
    T = len(model["position_embedding.weight"])

    heads = layers["blocks.0.attention.qkv"]
    n_head = len(heads) // 3
    if n_head < 2 and not re.search(r"heads?\.0", heads[0].lower()):
        stated = [n for key, n in parts if type(n) is int and re.fullmatch(N_HEAD, str(key))]
        if not stated:
            raise ValueError(f"{heads[0]} has all heads: save how many, too, as 'n_head'")
        n_head = stated[0]
    n_layer = sum("qkv" in name for name in layers)
    for n in range(n_layer):
        # Our qkv has no bias. A bias of ln1 can do what one of queries did. What this and one of
        # values add is the same everywhere: proj's bias can do it. Softmax ignores one of keys.
        qkv = model[f"blocks.{n}.attention.qkv.weight"]  # (3 C, C)
        if len(qkv) != 3 * C:
            raise ValueError(f"n_head ({n_head}) times the size of a head is not n_embd ({C})")
        query, _, value = qkv.chunk(3)  # (C, C) each
        query_bias, _, value_bias = model.pop(f"blocks.{n}.attention.qkv.bias").chunk(3)  # (C,)
        shift = torch.linalg.lstsq(query, query_bias[:, None]).solution[:, 0]  # (C,)
        proj = model[f"blocks.{n}.attention.proj.weight"]  # (C, C)
        model[f"blocks.{n}.attention.proj.bias"] += proj @ (value_bias - value @ shift)
        model[f"blocks.{n}.ln1.bias"] += shift
    config = dict(vocab_size=V, block_size=T, n_layer=n_layer, n_head=n_head, n_embd=C)
    vocab = find_vocab(parts, text, V)
    return choose_scale(dict(config=config, vocab=vocab, model=model, training={}), text, loss_of)


def recognise(weights, biases):
    """Our names of layers, each with the names of theirs: {ours: [theirs, ...]}; qkv may have many.

    ValueError if there are no blocks, or if a layer is unknown, missing, or there twice.
    """
    sizes = Counter(weight.shape[-1] for weight in weights.values())
    C = max(sizes, key=sizes.get, default=0)
    letters = {C: "C", 3 * C: "3C", 4 * C: "4C"}
    layers = defaultdict(list)
    misfits = []
    blocks = {None: ""}  # and what our names begin with
    for name in sorted(weights | biases, key=lambda name: list(map(int, re.findall(r"\d+", name)))):
        block, words = re.fullmatch(NAME, name.lower()).groups()
        ours = blocks.setdefault(block, f"blocks.{len(blocks) - 1}.")
        shape = " ".join(letters.get(size, "n") for size in weights[name].shape)
        if name in biases:
            words += " bias"
        roles = HEAD | BLOCK if block else OUTSIDE
        fits = [role for role in roles if re.match(roles[role], f"{shape}: {words}")]
        if not fits or HEAD.keys() & fits[1:] or fits[0] not in HEAD and layers[ours + fits[0]]:
            misfits.append(f"unexpected {name}")
        else:
            layers[ours + fits[0]].append(name)
    if len(blocks) == 1:
        raise ValueError(f"no blocks ({', '.join(weights):.99}): an earlier stage of the lecture?")

    layers["lm_head"] = layers["lm_head"] or layers["token_embedding"]  # tied: one matrix for both
    needed = ["token_embedding", "position_embedding"]
    for ours in list(blocks.values())[1:]:
        for kind in HEAD:
            layers[ours + "attention.qkv"] += layers.pop(ours + kind, [])
        needed += [ours + role for role in BLOCK]
    misfits += [f"missing {ours}" for ours in needed if not layers[ours]]
    if misfits:
        raise ValueError(", ".join(misfits))
    return layers


def choose_scale(ours, text, loss_of):
    """The checkpoint with the scale of attention scores that has the lowest loss, and a line."""
    beginning = "".join(character for character in text[:5000] if character in ours["vocab"])
    if len(beginning) < 2:
        raise ValueError(f"it knows {ours['vocab'][:99]!r}, the text has none of it: see --input")
    C = ours["config"]["n_embd"]
    root = math.sqrt(C / ours["config"]["n_head"])
    divisors = {"the root of head_size": root, "the root of n_embd": math.sqrt(C), "1": 1}
    tried = []
    for name, divisor in divisors.items():
        factors = torch.ones(3 * C, 1)
        factors[:C] = root / divisor  # larger queries do what a smaller divisor does
        qkv = {key: factors * ours["model"][key] for key in ours["model"] if "qkv" in key}
        scaled = ours | {"model": ours["model"] | qkv}
        tried.append((loss_of(scaled, beginning), name, scaled))
    loss, name, best = min(tried)
    untrained = math.log(len(ours["vocab"]))
    warning = ""
    if not loss < 0.8 * untrained:  # nan, too
        loss, name, best = tried[0]
        warning = "; WARNING: another text, or a changed model?"
    line = f"the lecture's model, attention scores divided by {name}: loss {loss:.2f} on the first "
    line += f"{len(beginning):,} characters; your own training loss should be near this (by "
    line += ", by ".join(f"{name}: {loss:.2f}" for loss, name, _ in tried)
    return best, f"{line}; untrained: {untrained:.2f}){warning}"


def find_tensors(parts):
    """The weights and biases of layers, {name: tensor} each: from the dict with most tensors."""
    dicts = [part for _, part in parts if isinstance(part, dict)]
    tensors = max(dicts, key=lambda part: sum(map(torch.is_tensor, part.values())), default={})
    weights = defaultdict(lambda: torch.empty(0))
    biases = {}
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
            continue
        if tensor.dim() > 2:
            tensor = tensor.flatten(0, -2)  # a mask of (1, 1, T, T), or positions of (1, T, C)
        if tensor.dim() == 1 or not torch.equal(tensor, torch.ones_like(tensor).tril()):
            layer, kind = re.fullmatch(r"(.+?)[._]?(weight|gamma|bias|beta|)", str(name)).groups()
            kinds = biases if kind in ("bias", "beta") else weights
            kinds[layer] = tensor.double()
    return weights, biases


def find_vocab(parts, text, V):
    """The V characters in the order of their ids, from a string, list, stoi, itos, or the text."""
    for _, part in parts:
        if isinstance(part, dict) and set(map(type, part.values())) == {int}:
            part = {i: character for character, i in part.items()}  # stoi becomes itos
        if isinstance(part, dict):
            part = [part.get(i) for i in range(V)]
        if isinstance(part, (str, list)) and V == len(part) == len("".join(map(str, part))):
            return "".join(part)
    vocab = "".join(sorted(set(text)))
    if len(vocab) == V - 1:
        vocab = "".join(sorted(vocab + "\ufeff"))  # a byte order mark, read as a character
    if len(vocab) != V:
        raise ValueError(f"the model knows {V} characters, the text has {len(vocab)}: see --input")
    return vocab


def walk(part, key=""):
    """Yield a part of a checkpoint and its key, then all that is in it."""
    yield key, part
    if isinstance(part, dict):
        for inner, value in part.items():
            yield from walk(value, inner)
