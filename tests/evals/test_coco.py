from __future__ import annotations

import shutil

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.evals.coco import score_captions

REFERENCES = {
    "a": ["A dog runs on the grass.", "A brown dog running."],
    "b": ["Two people ride bikes down a street.", "People riding bicycles."],
    "c": ["A cat sleeps on a red sofa.", "The cat is asleep on the couch."],
}


@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_scores_equal_the_packages_own_driver() -> None:
    from pycocoevalcap.eval import COCOEvalCap

    predictions = {"a": "A dog runs.", "b": "Two people on bikes.", "c": "A dog sleeps on a sofa, naïvely."}
    scores, each = score_captions(REFERENCES, predictions)

    class Annotations:
        def __init__(self, captions: dict[str, list[str]]) -> None:
            self.imgToAnns = {k: [{"caption": c} for c in v] for k, v in captions.items()}

        def getImgIds(self) -> list[str]:
            return sorted(self.imgToAnns)

    driver = COCOEvalCap(Annotations(REFERENCES), Annotations({k: [v] for k, v in predictions.items()}))
    # The driver's SPICE downloads its parser; the rest is what is compared.
    import pycocoevalcap.eval as module

    module.Spice = lambda: type(
        "None_", (), {"compute_score": lambda *_: (0.0, [{}] * 3), "method": lambda _: ""}
    )()
    driver.setImgToEvalImgs = lambda *_: None
    driver.evaluate()
    names = {
        "Bleu_1": "BLEU-1",
        "Bleu_4": "BLEU-4",
        "METEOR": "METEOR",
        "ROUGE_L": "ROUGE-L",
        "CIDEr": "CIDEr",
    }
    for theirs, ours in names.items():
        assert scores[ours] == pytest.approx(100 * driver.eval[theirs], abs=1e-6)
    assert each["a"]["CIDEr"] > each["c"]["CIDEr"]


def test_pictures_that_differ_are_counted_and_named() -> None:
    with pytest.raises(UserError, match="differ in 2 pictures, b the first"):
        score_captions(REFERENCES, {"a": "A dog."})


def test_a_picture_without_references_is_named() -> None:
    with pytest.raises(UserError, match="1 pictures have no reference caption, a the first"):
        score_captions({"a": []}, {"a": "A dog."})


def test_without_java_the_package_to_install_is_named(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="default-jre-headless"):
        score_captions({"a": ["A dog."]}, {"a": "A dog."})
