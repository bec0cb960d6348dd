"""Turn weights from the lecture's own code into checkpoints of this project.

People who type along change names: ffwd becomes mlp, sa becomes attn. They forget bias=False, leave
out other biases, or have one matrix for all heads. torch.compile puts _orig_mod. before all names.
Many files have more than weights: characters, sizes, an optimizer. So we recognise a layer by its
place (in a block or outside) and its shape. Names only decide between layers of the same shape.
"""

import math
import re
from collections import defaultdict
from statistics import mode

import torch

# Our layers, and patterns for "shape: name" of theirs: the first that fits counts. C is n_embd, n
# any size but C, 3C and 4C. Names are in lower case, without the name of the block.
OUTSIDE = {
    "ln_f": "C: ",
    "position_embedding": r"\w+ C: .*(pos|time|\bw?pe\b)",
    "token_embedding": r"\w+ C: (?!.*unemb).*(tok|emb|char|wte|encoder)",
    "lm_head": r"\w+ C: ",
}
HEAD = {
    "query": r"[nC] C: (.*[^a-z])?w?(q|quer\w*)([^a-z]|$)",
    "key": r"[nC] C: (.*[^a-z])?w?(k|key\w*)([^a-z]|$)",
    "value": r"[nC] C: (.*[^a-z])?w?(v|val\w*)([^a-z]|$)",
}
BLOCK = {
    "ln2": r"C: .*(2|second|ff|fwd|feed|mlp|post|after|b\b|\.1\b)",
    "ln1": "C: ",
    "attention.qkv": "3C C: (?!.*(kqv|kvq|vkq|vqk|qvk))",
    "attention.proj": "C C: ",
    "feed_forward.up": "4C C: (?!.*c_fc)",  # after c_fc, GPT-2 and nanoGPT have no ReLU
    "feed_forward.down": "C 4C: ",
}
NAME = r"(?:(.*?(?<!heads\.)(?<!head\.)(?<!\d)\d+)\.)?(.*)"  # blocks.0 (not heads.0) or None
N_HEAD = r"(?i)(n|num)?_?(attention_|attn_)?heads?"  # what people call the number of heads


def convert(checkpoint, text, loss_of):
    """A checkpoint of ours, as a dict, and a line that says how well it fits the text.

    loss_of(ours, text) decides how scores are scaled. ValueError if it is another model.
    """
    parts = list(walk(checkpoint))
    weights, biases, masks = find_tensors(parts)
    layers = recognise(weights, biases)
    biases = {name: weight.new_zeros(len(weight)) for name, weight in weights.items()} | biases
    model = {}
    for ours, theirs in layers.items():
        model[f"{ours}.weight"] = torch.cat([weights[name] for name in theirs])
        model[f"{ours}.bias"] = torch.cat([biases[name] for name in theirs])
    del model["token_embedding.bias"], model["position_embedding.bias"]
    if "ln_f" in layers and (model["ln_f.weight"] == 1).all():
        del model["ln_f.weight"], model["ln_f.bias"]  # as at the start: the model did not use it
    V, C = model["token_embedding.weight"].shape
    T = min(map(len, [model["position_embedding.weight"], *masks]))  # the rest was never used
    model["position_embedding.weight"] = model["position_embedding.weight"][:T]
    heads = layers["blocks.0.attention.qkv"]
    n_head = len(heads) // 3 or 1
    if n_head == 1 and not re.search(r"heads?\.0", heads[0].lower()):  # one for all, or one head
        stated = [n for key, n in parts if re.fullmatch(N_HEAD, str(key)) and str(n).isdigit()]
        if not stated:
            raise ValueError(f"how many heads has {heads[0]}? The file lacks 'n_head'")
        n_head = int(stated[0])
    n_layer = sum("qkv" in name for name in layers)
    for n in range(n_layer):
        qkv = model[f"blocks.{n}.attention.qkv.weight"]  # (3 C, C)
        if len(qkv) != 3 * C:
            raise ValueError(f"n_head ({n_head}) times the size of a head is not n_embd ({C})")
        bias = model.pop(f"blocks.{n}.attention.qkv.bias")  # (3 C,)
        if bias.any():
            # We have no such biases. A shift of the input gives queries theirs. What values then
            # lack goes through proj into its bias. Softmax cancels what all keys have in common.
            query, _, value = qkv.chunk(3)  # (C, C) each
            query_bias, _, value_bias = bias.chunk(3)  # (C,) each
            shift = torch.linalg.solve(query, query_bias)  # (C,)
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
    C = mode([0] + [weight.shape[-1] for weight in weights.values()])
    letters = {C: "C", 3 * C: "3C", 4 * C: "4C"}
    layers = defaultdict(list)
    misfits = [f"unexpected {name}" for name in biases if name not in weights]
    prefixes = {None: ""}  # their name of a block: ours; None is outside
    for name in sorted(weights, key=lambda name: list(map(int, re.findall(r"\d+", name)))):
        block, rest = re.fullmatch(NAME, name.lower()).groups()
        prefix = prefixes.setdefault(block, f"blocks.{len(prefixes) - 1}.")
        shape = " ".join(letters.get(size, "n") for size in weights[name].shape)
        patterns = HEAD | BLOCK if block else OUTSIDE
        fits = [role for role in patterns if re.match(patterns[role], f"{shape}: {rest}")]
        if not fits or HEAD.keys() & fits[1:]:  # none, or two of HEAD, as for query_key
            misfits.append(f"unexpected {name}")
        else:
            layers[prefix + fits[0]].append(name)
    if len(prefixes) == 1:
        raise ValueError(f"no blocks ({', '.join(weights):.99}): an earlier stage of the lecture?")
    layers["lm_head"] = layers["lm_head"] or layers["token_embedding"]  # tied: one matrix for both
    needed = ["token_embedding", "position_embedding"]
    for prefix in list(prefixes.values())[1:]:
        for role in HEAD:
            layers[prefix + "attention.qkv"] += layers.pop(prefix + role, [])
        needed += [prefix + role for role in BLOCK]
    misfits += [f"found no {ours}" for ours in needed if not layers[ours]]
    for ours, theirs in layers.items():
        if len(theirs) > 1 and "qkv" not in ours:
            misfits.append(f"{' and '.join(theirs)} both look like {ours}")
    if misfits:
        raise ValueError(", ".join(misfits))
    return layers


def choose_scale(ours, text, loss_of):
    """The checkpoint with the scale of attention scores that has the lowest loss, and a line."""
    beginning = "".join(c for c in text[:5000] if c in ours["vocab"])
    if len(beginning) < 2:
        raise ValueError(f"the text has hardly any of {ours['vocab'][:99]!r}: see --input")
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
    losses = ", ".join(f"by {name}: {loss:.2f}" for loss, name, _ in tried)
    line = f"the lecture's model, attention scores divided by {name}: loss {loss:.2f} on the first "
    line += f"{len(beginning):,} characters; your own training loss should be near this "
    return best, f"{line}({losses}; untrained: {untrained:.2f}){warning}"


def find_tensors(parts):
    """Weights and biases by name of the layer, and masks: from the dict with most weights."""
    dicts = [part for _, part in parts if isinstance(part, dict)]
    tensors = max(dicts, key=lambda part: str(list(part)).count("weight"), default={})
    found = defaultdict(dict)
    for name, tensor in tensors.items():
        if torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.dim() > 0:
            tensor = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor  # positions (1, T, C)
            layer, kind = re.fullmatch(r"(.+?)[._]?(weight|gamma|bias|beta|)", str(name)).groups()
            if tensor.dim() == 2 and len(set(tensor.shape)) == 1 and len(tensor.unique()) == 2:
                kind = "mask"  # a square of two numbers: who may see whom
            found[kind][layer] = tensor.double()
    weights = found["weight"] | found["gamma"] | found[""]
    return weights, found["bias"] | found["beta"], list(found["mask"].values())


def find_vocab(parts, text, V):
    """The V characters in the order of their ids, from a string, list, stoi, itos, or the text."""
    for _, part in parts:
        if isinstance(part, dict) and set(map(type, part.values())) == {int}:
            part = {i: character for character, i in part.items()}  # stoi becomes itos
        if isinstance(part, dict):
            part = [part.get(i, "") for i in range(len(part))]
        if isinstance(part, (str, list, tuple)) and len(part) == V == len(set(map(str, part))):
            if max(map(len, map(str, part))) == 1:
                return "".join(map(str, part))
    for characters in (set(text), {*text, "\ufeff"}):  # some read a byte order mark as one
        if len(characters) == V:
            return "".join(sorted(characters))
    raise ValueError(f"the model knows {V} characters, the text has {len(set(text))}: see --input")


def walk(part, key=""):
    """Yield a part of a checkpoint and its key, then all that is in it."""
    yield key, part
    if isinstance(part, (list, tuple)):
        part = dict(enumerate(part))
    if isinstance(part, dict):
        for inner, value in part.items():
            yield from walk(value, inner)
