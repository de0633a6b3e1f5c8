"""Labels and captions as people write them: a data set's parts, COCO's annotations, names that match whole."""

import json

import pytest

from labels import check_no_splits, match_names, read_coco, texts_of


@pytest.mark.parametrize("names", [
    {"train", "val"}, {"Training", "Test_Set"}, {"train2014", "val2014"}, {"train-0001.tar", "validation-0001.tar"},
    {"set-train-00.tar", "set-train-01.tar", "set-test-00.tar"}, {"cats_train", "cats_test"}, {"train"},
    {"test_images"}])
def test_parts_of_a_data_set_are_no_classes(names, tmp_path):
    with pytest.raises(ValueError, match="are parts of a data set, no classes; set SOURCE to"):
        check_no_splits(tmp_path, names)


@pytest.mark.parametrize("names", [
    {"train", "bus"}, {"test tube", "train"}, {"n01", "n02"}, {"cats"}, {"trained", "tested"}, set(),
    {"imagenet-train-0000.tar", "imagenet-train-0001.tar"}, {"valid", "invalid"}])
def test_classes_may_have_such_words_in_their_names(names, tmp_path):
    check_no_splits(tmp_path, names)


def test_the_training_part_is_the_one_to_take(tmp_path):
    with pytest.raises(ValueError, match=f"set SOURCE to {tmp_path}/Training$"):
        check_no_splits(tmp_path, {"Test", "Training"})


def test_names_match_by_their_longest_end():
    names = ["x/a/1.PNG", "x/b/1.png", "x/cafe\u0301.png", "y/2.png"]
    wanted = ["a/1.png", "b/1.png", "caf\u00e9.png", "elsewhere/2.png", "3.png"]
    found = match_names(wanted, names, "c.json")
    assert list(found.values()) == ["x/a/1.PNG", "x/b/1.png", "x/cafe\u0301.png", "y/2.png", None]


@pytest.mark.parametrize("wanted, message", [
    (["1.png"], "c.json: 1.png may be a/1.png or b/1.png; name it there with its folder"),
    (["y/2.png", "z/2.png"], "c.json: y/2.png and z/2.png may both be c/2.png; give each its folder there")])
def test_names_that_could_be_two_images_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        match_names(wanted, ["a/1.png", "b/1.png", "c/2.png"], "c.json")


def test_two_entries_of_one_file_keep_both_their_captions_and_null_is_none(tmp_path):
    images = [dict(id=2, file_name="a\\1.PNG"), dict(id=1, file_name="a/1.png"), dict(id=3, file_name="b.png")]
    annotations = [dict(image_id=2, caption="second"), dict(image_id=1, caption="first"),
                   dict(image_id=1, caption=None), dict(image_id=3, caption=3)]
    (tmp_path / "c.json").write_text(json.dumps(dict(images=images, annotations=annotations)))
    _, found = read_coco(tmp_path / "c.json")
    assert found == {"a/1.png": ["first", "second"], "b.png": []}


def test_only_texts_are_captions():
    assert texts_of("a\n cat ") == ["a cat"] and texts_of(["x", " ", "y"]) == ["x", "y"] and texts_of(None) == []
    for said in (dict(short="a cat"), 3, ["x", 2], [["x"]]):
        with pytest.raises(ValueError, match="a caption that is no text"):
            texts_of(said)
