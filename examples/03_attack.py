"""Attack two models with the same LoRA training and compare how much each one learns."""

from mima import embedded_concept, load_embedded
from mima.adaptation import LoRA
from mima.erasure import erase
from mima.evaluation import Sampler, attack, compare, load_encoder

concept = embedded_concept("tiger")
original = load_embedded()
erased = erase(original, [concept], preserve=[embedded_concept("penguin")])

curves = [
    attack(
        pipeline,
        concept,
        LoRA(rank=4, learning_rate=5e-4, batch_size=2, seed=0),
        encoder=load_encoder("embedded"),
        steps=(0, 5),
        seeds=(0,),
        sampler=Sampler(steps=8, guidance=3.0, scheduler="dpm++"),
        max_prompts=2,
    )
    for pipeline in (original, erased)
]
for label, curve in zip(("original", "erased"), curves, strict=True):
    print(label, {s: round(v, 3) for s, v in zip(curve.steps, curve.similarity, strict=True)})
gap = compare(*curves)
print("similarity gap ratio at each step:", [round(value, 3) for value in gap.sgr])
