from support.evaluations import write_evaluation

from mima.evaluation.folder import EvaluationFolder


def test_parts_beside_the_denoiser_that_differ_are_named(tmp_path):
    evaluation = EvaluationFolder(write_evaluation(tmp_path)).evaluation()

    def sides(one, other):
        return {"original": one, "immunized": other}

    config = {
        "weights": sides("a", "a"),
        "encoders": sides({"vae": "a", "text_encoder": "a"}, {"vae": "b", "text_encoder": "a"}),
        "schedulers": sides("a", "b"),
        "configurations": sides(
            {"unet": "a", "vae": "a", "text_encoder": "a", "tokenizer_2": "a"},
            {"unet": "a", "vae": "b", "text_encoder": "b", "tokenizer_2": "b"},
        ),
    }
    apart = evaluation.model_copy(update={"config": config})
    named = ("vae", "noise schedule", "text encoder settings", "tokenizer 2")
    assert (apart.other_parts, apart.same_denoiser) == (named, True)
    # older records lack some, and the oldest all
    for config in ({"weights": sides("a", "b")}, {}):
        record = evaluation.model_copy(update={"config": config})
        assert (record.other_parts, record.same_denoiser) == ((), False)
