"""Published keypoint formats: round trips, missing joints, malformed files."""

import itertools
import json
import re
import tracemalloc

import numpy as np
import pytest

from cfld.keypoints import (
    BadRow,
    ImagePeople,
    KeypointsError,
    main_person,
    read_keypoints,
    read_pose,
)
from cfld.pose import JOINT_NAMES
from tests.keypoint_files import write_coco_json, write_openpose_json, write_patn_csv

HEADER = "name:keypoints_y:keypoints_x\n"
MISSING = (np.nan, np.nan, 0)


def make_people(num_people: int, *, seed: int = 0, whole: bool = False) -> np.ndarray:
    generator = np.random.default_rng(seed)
    people = generator.uniform(2, 300, (num_people, 18, 3)).astype(np.float32)
    people[..., 2] = 1 if whole else generator.uniform(0.1, 1, (num_people, 18))
    if whole:
        people[..., :2] = np.rint(people[..., :2])
    people[generator.uniform(size=(num_people, 18)) < 0.2] = MISSING
    return people


def with_coco_neck(people: np.ndarray) -> np.ndarray:
    people = people.copy()
    shoulders = people[:, [2, 5]]
    people[:, 1, :2] = shoulders[..., :2].mean(axis=1)
    people[:, 1, 2] = shoulders[..., 2].min(axis=1)
    return people


def joint(name: str) -> int:
    return JOINT_NAMES.index(name)


class TestPatn:
    def test_round_trip(self, tmp_path):
        people = make_people(5, whole=True)
        write_patn_csv(tmp_path / "a.csv", [(f"im:{i}.jpg", p) for i, p in enumerate(people)])
        read = list(read_keypoints(tmp_path / "a.csv"))
        assert [image.name for image in read] == [f"im:{i}.jpg" for i in range(5)]
        np.testing.assert_array_equal(np.concatenate([image.people for image in read]), people)

    def test_first_list_is_y(self, tmp_path):
        y, x = [5] * 17 + [-1], [9] * 17 + [-1]
        (tmp_path / "a.csv").write_text(f"{HEADER}a.jpg: {y}: {x}\n")
        people = next(iter(read_keypoints(tmp_path / "a.csv"))).people
        np.testing.assert_array_equal(people[0, 0], (9, 5, 1))
        np.testing.assert_array_equal(people[0, 17], MISSING)

    def test_image_without_joints_has_no_people(self, tmp_path):
        (tmp_path / "a.csv").write_text(f"{HEADER}a.jpg: {[-1] * 18}: {[-1] * 18}\n")
        assert next(iter(read_keypoints(tmp_path / "a.csv"))).people.shape == (0, 18, 3)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("no colon", "is not of the form"),
            (f": {[1] * 18}: {[1] * 18}", "is not of the form"),
            (f"a.jpg: {[1] * 17}: {[1] * 18}", "17 values, expected 18"),
            ("a.jpg: 3: 4", "no list, expected 18"),
            ("a.jpg: " + "[" * 100_000 + ": [1]", "recursion"),
            (f"a.jpg: {[1] * 18}: [1, 2", "delimiter"),
            (f"a.jpg: {[10**300] * 18}: {[1] * 18}", "other than finite numbers"),
            (f"a.jpg: {['x'] * 18}: {[1] * 18}".replace("'", '"'), "other than finite numbers"),
            (f"a.jpg: {[-7] * 18}: {[1] * 18}", "negative coordinate other than -1"),
        ],
    )
    def test_malformed_row_is_reported_and_the_rest_is_read(self, tmp_path, line, reason):
        good = f"good.jpg: {[1] * 18}: {[2] * 18}\n"
        (tmp_path / "a.csv").write_text(HEADER + good + line + "\n\n" + good)
        first, bad, last = read_keypoints(tmp_path / "a.csv")
        assert isinstance(bad, BadRow)
        assert bad.row == 3
        assert reason in bad.reason
        assert first.name == last.name == "good.jpg"

    def test_odd_names_survive(self, tmp_path):
        name = "a b.c: ü\udcff.jpg"  # the last is a byte that is no UTF-8
        row = f"{name}: {[1] * 18}: {[2] * 18}\r\n"
        (tmp_path / "a.csv").write_bytes(
            b"\xef\xbb\xbf" + (HEADER + row).encode("utf-8", "surrogateescape")
        )
        assert next(iter(read_keypoints(tmp_path / "a.csv"))).name == name

    def test_memory_does_not_grow_with_rows(self, tmp_path):
        row = f"{[123] * 18}: {[45] * 18}\n"
        with (tmp_path / "a.csv").open("w") as file:
            file.writelines(itertools.chain([HEADER], (f"{i}.jpg: {row}" for i in range(2_000))))
        tracemalloc.start()
        assert sum(1 for _ in read_keypoints(tmp_path / "a.csv")) == 2_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (tmp_path / "a.csv").stat().st_size / 4


class TestOpenPose:
    @pytest.mark.parametrize("num_points", [18, 25])
    def test_round_trip(self, tmp_path, num_points):
        people = make_people(3)
        write_openpose_json(tmp_path / "photo_keypoints.json", people, num_points=num_points)
        (image,) = read_keypoints(tmp_path / "photo_keypoints.json")
        assert image.name == "photo"
        np.testing.assert_array_equal(image.people, people)

    def test_body_25_has_the_mid_hip_in_the_ninth_place(self, tmp_path):
        # Numbers from OpenPose's table: 8 MidHip, 9 RHip, 12 LHip, 15 REye, 18 LEar, 19 LBigToe.
        points = [[float(i + 2), 0.0, 1.0] for i in range(25)]
        content = {"people": [{"pose_keypoints_2d": [v for p in points for v in p]}]}
        (tmp_path / "a.json").write_text(json.dumps(content))
        x = read_pose(str(tmp_path / "a.json"))[:, 0] - 2
        assert x[joint("right_hip")] == 9
        assert x[joint("left_hip")] == 12
        assert x[joint("right_eye")] == 15
        assert x[joint("left_ear")] == 18

    def test_key_of_older_versions(self, tmp_path):
        points = [10.0, 20.0, 0.5] * 18
        (tmp_path / "a.json").write_text(json.dumps({"people": [{"pose_keypoints": points}]}))
        np.testing.assert_array_equal(read_pose(str(tmp_path / "a.json"))[4], (10, 20, 0.5))

    def test_takes_the_main_person(self, tmp_path):
        people = make_people(3)
        people[1, :, :2] *= 4
        write_openpose_json(tmp_path / "a.json", people)
        np.testing.assert_array_equal(read_pose(str(tmp_path / "a.json")), people[1])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"people": [{"pose_keypoints_2d": [1.0] * 45}]}, "45 values, expected 54 or 75"),
            ({"people": [{"hand_left_keypoints_2d": []}]}, r"people\[0\]: has neither of the keys"),
            ({"people": {"pose_keypoints_2d": []}}, "key 'people' is not a list of objects"),
            ({"people": [{"pose_keypoints_2d": [0.5, 0.4, 1] * 18}]}, "--keypoint_scale 0"),
            ({"people": [{"pose_keypoints_2d": [None] * 54}]}, "other than finite numbers"),
            ({"people": []}, "lists no person"),
            ({"people": [{"pose_keypoints_2d": [0] * 54}]}, "lists no person"),
            ({"shapes": []}, "has no key 'people'"),
            (3, "has no key 'people'"),
        ],
    )
    def test_unusable_file_is_a_clear_error(self, tmp_path, content, message):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(KeypointsError, match=rf"a\.json.*{message}"):
            read_pose(str(tmp_path / "a.json"))


class TestCoco:
    def test_annotations_round_trip(self, tmp_path):
        images = [
            ImagePeople("b.jpg", make_people(2)),
            ImagePeople("a.jpg", make_people(1, seed=1)),
        ]
        write_coco_json(tmp_path / "a.json", [*images, ImagePeople("empty.jpg", make_people(0))])
        *read, empty = read_keypoints(tmp_path / "a.json")
        assert empty.name == "empty.jpg"
        assert len(empty.people) == 0
        for image, expected in zip(read, images, strict=True):
            assert image.name == expected.name
            people = with_coco_neck(expected.people)
            np.testing.assert_allclose(image.people[..., :2], people[..., :2])
            np.testing.assert_array_equal(image.people[..., 2], people[..., 2] > 0)

    def test_results_round_trip(self, tmp_path):
        images = [ImagePeople("7", make_people(2)), ImagePeople("x.jpg", make_people(1, seed=1))]
        write_coco_json(tmp_path / "a.json", images, as_results=True)
        for image, expected in zip(read_keypoints(tmp_path / "a.json"), images, strict=True):
            assert image.name == expected.name
            np.testing.assert_allclose(image.people, with_coco_neck(expected.people))

    def test_order_and_hidden_joints(self, tmp_path):
        # Numbers from COCO's table: 1 left eye, 4 right ear, 6 right shoulder, 16 right ankle.
        points = [[float(i), 50.0, 1 + i % 2] for i in range(17)]
        points[5][2] = 0  # the left shoulder is missing, hence the neck
        entry = {"image_id": 4, "keypoints": [v for p in points for v in p]}
        (tmp_path / "a.json").write_text(json.dumps({"annotations": [entry]}))
        (image,) = read_keypoints(tmp_path / "a.json")
        x = image.people[0, :, 0]
        assert image.name == "4"
        assert x[joint("left_eye")] == 1
        assert x[joint("right_ear")] == 4
        assert x[joint("right_shoulder")] == 6
        assert x[joint("right_ankle")] == 16
        np.testing.assert_array_equal(image.people[0, joint("neck")], MISSING)
        np.testing.assert_array_equal(image.people[0, joint("left_shoulder")], MISSING)

    def test_malformed_annotations_are_reported(self, tmp_path):
        good = {"image_id": 1, "keypoints": [10, 20, 2] * 17}
        bad = [{"image_id": 1}, {**good, "keypoints": [1] * 54}, {**good, "image_id": [1]}, 5]
        bad += [{**good, "keypoints": [0.4, 0.9, 2] * 17}]
        (tmp_path / "a.json").write_text(json.dumps([*bad, good]))
        *reports, image = read_keypoints(tmp_path / "a.json")
        assert [report.row for report in reports] == [1, 2, 3, 4, 5]
        assert "has no key 'keypoints'" in reports[0].reason
        assert "54 values, expected 51" in reports[1].reason
        assert "image_id is neither" in reports[2].reason
        assert "fractions of the image; pixels are needed" in reports[4].reason
        assert len(image.people) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"annotations": {}}, "key 'annotations' is not a list"),
            ({"annotations": [], "images": [1]}, "key 'images' is not a list of objects"),
            ({"annotations": [], "images": [{"id": 1}]}, "'images' has no key 'file_name'"),
            ({"annotations": [], "images": [{"id": [1], "file_name": "x"}]}, "unhashable"),
        ],
    )
    def test_unusable_file_is_a_clear_error(self, tmp_path, content, message):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(KeypointsError, match=rf"a\.json: .*{message}"):
            list(read_keypoints(tmp_path / "a.json"))


class TestReadPose:
    @pytest.fixture
    def csv(self, tmp_path):
        people = make_people(3, whole=True)
        write_patn_csv(tmp_path / "b.csv", zip(("a.jpg", "b:c.jpg", "d.jpg"), people, strict=True))
        return tmp_path / "b.csv", people

    def test_by_name(self, csv):
        path, people = csv
        np.testing.assert_array_equal(read_pose(f"{path}:b:c.jpg"), people[1])

    def test_unknown_name(self, csv):
        with pytest.raises(KeypointsError, match=r"b\.csv: has no image 'z\.jpg'; check the name"):
            read_pose(f"{csv[0]}:z.jpg")

    def test_name_is_needed_among_several(self, csv):
        with pytest.raises(KeypointsError, match=r"say which one: .*b\.csv:a\.jpg"):
            read_pose(str(csv[0]))

    def test_name_is_not_needed_for_one(self, tmp_path):
        people = make_people(1, whole=True)
        write_patn_csv(tmp_path / "b.csv", [("a.jpg", people[0])])
        np.testing.assert_array_equal(read_pose(str(tmp_path / "b.csv")), people[0])

    def test_malformed_rows_are_mentioned(self, tmp_path):
        (tmp_path / "b.csv").write_text(HEADER + "a.jpg: 1: 2\n")
        with pytest.raises(
            KeypointsError, match="1 rows are malformed, the first is row 2: no list"
        ):
            read_pose(f"{tmp_path / 'b.csv'}:a.jpg")

    def test_neither_csv_nor_json(self, tmp_path):
        (tmp_path / "b.csv").write_bytes(b"from,to\n\xff\x00")
        with pytest.raises(KeypointsError, match=re.escape("b.csv: neither a csv with the header")):
            read_pose(str(tmp_path / "b.csv"))

    @pytest.mark.parametrize("content", ['{"people": [', "[" * 100_000, "9" * 5_000])
    def test_broken_json(self, tmp_path, content):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(KeypointsError, match=r"b\.json: neither a csv with the header"):
            read_pose(str(tmp_path / "b.json"))

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"b\.csv"):
            read_pose(f"{tmp_path / 'b.csv'}:a.jpg")


class TestMainPerson:
    def square(self, centre: tuple[float, float], size: float, score: float = 1.0) -> np.ndarray:
        unit = np.random.default_rng(0).uniform(-0.5, 0.5, (18, 2))
        points = np.array(centre) + size * unit
        return np.column_stack((points, np.full(18, score))).astype(np.float32)

    def test_largest(self):
        people = np.stack([self.square((50, 50), 20), self.square((30, 30), 40)])
        assert main_person(people) == 1

    def test_most_central_of_equal_size(self):
        people = np.stack([self.square((20, 50), 30), self.square((100, 50), 30)])
        assert main_person(people, (100, 200)) == 1
        assert main_person(people[::-1], (100, 200)) == 0

    def test_most_confident_of_equal_size(self):
        people = np.stack([self.square((50, 50), 30, 0.4), self.square((50, 50), 30, 0.8)])
        assert main_person(people, (100, 100)) == 1

    def test_nobody(self):
        nobody = np.full((1, 18, 3), MISSING, dtype=np.float32)
        assert main_person(nobody) is None
        assert main_person(nobody[:0]) is None

    def test_single_joint_is_somebody(self):
        people = np.full((2, 18, 3), MISSING, dtype=np.float32)
        people[1, 0] = (3, 4, 0.5)
        assert main_person(people, (10, 10)) == 1
