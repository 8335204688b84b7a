"""From a config to what is compiled: a job for every line, at the aspect ratio with the most tokens."""

import pytest
from ml_collections import ConfigDict

from configs.diffusion.inference import t2i2v_256px
from configs.diffusion.train import stages
from opensora_jax.config.errors import UserError
from opensora_jax.forecast.job import Job, versions
from opensora_jax.forecast.jobs import has_auto, make_groups, missing_text_encoders, parse_lines, sizes_on
from opensora_jax.forecast.topology import parse_topology
from opensora_jax.parallel.mesh import MeshConfig
from tests.forecast import small

FOUR = parse_topology("v5e:2x2")


def test_every_line_is_a_job_at_the_ratio_with_the_most_pixels():
    groups = make_groups(small.training(), FOUR, [], {})
    subjects = [group.wanted[0].job.subject for group in groups]
    assert [(one["resolution"], one["num_frames"], one["batch_size"]) for one in subjects] == [
        ("64px_ar1:1", 5, 2),
        ("32px", 9, 4),
        ("32px", 1, 6),
    ]
    assert subjects[1]["height"] * subjects[1]["width"] == 24 * 48  # 32 x 32 has fewer
    assert groups[1].title == "32px 2.39:1, 9 frames of 24x48"
    assert [wanted.times for wanted in groups[0].wanted] == [1]


def test_lines_narrow_it_down():
    (group,) = make_groups(small.training(), FOUR, parse_lines(["32px,1"]), {})
    assert group.wanted[0].job.subject["num_frames"] == 1
    with pytest.raises(UserError, match=r"--buckets=48px,3 is no line .* there are 32px,1; 32px,9; 64px_ar1:1,5"):
        make_groups(small.training(), FOUR, parse_lines(["48px,3"]), {})
    with pytest.raises(UserError, match="--buckets takes a resolution and frames, as in --buckets=768px,129: got '768"):
        parse_lines(["768px"])


def test_a_batch_size_left_to_the_memory_counts_as_one():
    config = small.training()
    config.bucket_config = {"32px": {9: (1.0, "auto")}}
    assert has_auto(config)
    assert not has_auto(small.training())
    (group,) = make_groups(config, FOUR, [], {})
    assert group.wanted[0].job.subject["batch_size"] == 1


def test_stages_come_one_after_the_other():
    topology = parse_topology("v5p:4x4x4")
    config = stages.get_config()
    config.stages = ("image", "stage2")
    groups = make_groups(config, topology, parse_lines(["768px,1", "768px,129"]), {})
    assert [group.title.split(",")[0] for group in groups] == ["image", "stage2", "stage2"]
    assert groups[1].wanted[0].job.sections["mesh"] == {
        "data": 1,
        "fsdp": 16,
        "seq": 4,
        "tensor": 1,
        "seq_method": config.stage2.mesh.seq_method,
    }


def test_stages_are_checked_as_in_training():
    config = stages.get_config()
    config.stages = ("image", "stge2")
    with pytest.raises(UserError, match=r"config\.stages names some of image, stage1, .*got \('image', 'stge2'\)"):
        make_groups(config, FOUR, [], {})
    config.stages = ("image",)
    assert not has_auto(config)
    config.image.bucket_config = {"256px": {1: (1.0, "auto")}}
    assert has_auto(config)
    del config.image["ema_decay"]
    with pytest.raises(UserError, match=r"config\.image\.ema_decay is missing"):
        make_groups(config, FOUR, [], {})


def test_sampling_has_a_program_for_every_set_of_branches_and_a_decode():
    config = small.sampling()
    (group,) = make_groups(config, FOUR, [], {})
    kinds = [(wanted.job.kind, wanted.job.subject, wanted.times) for wanted in group.wanted]
    assert kinds == [("sample", ["cond", "uncond"], 20), ("sample", ["cond"], 10), ("decode", None, 1)]
    assert group.videos == config.batch_size
    sized = make_groups(config, FOUR, parse_lines(["64px,5", "32px,1"]), {})
    assert [one.title for one in sized] == ["64px 1:1, 5 frames", "32px 1:1, 1 frame"]


def test_videos_that_begin_with_an_image_have_its_programs_too():
    groups = make_groups(t2i2v_256px.get_config(), parse_topology("v5p:2x2x1"), [], {})
    assert [group.title for group in groups] == ["image, 768px 16:9, 1 frame", "video, 256px 16:9, 129 frames"]
    assert [wanted.job.subject for wanted in groups[0].wanted] == [["cond"], None]
    assert groups[0].wanted[0].job.sections["model"]["guidance_embed"]
    assert groups[0].wanted[0].job.sections["text_networks"]["t5"]["d_model"] == 4096  # published, and not here


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decode_batch_size": 0}, "batch_size and decode_batch_size are at least 1: got 8 and 0"),
        ({"use_t2i2v": True, "cond_type": "i2v_head"}, "use_t2i2v needs config.img_flux"),
        ({"clip": None}, r"config\.clip\.from_pretrained is missing"),
    ],
)
def test_sampling_configs_that_lack_something_are_refused(change, said):
    config = small.sampling().unlock()
    config.sampling_option.guidance_img = 3.0
    for name, value in change.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    with pytest.raises(UserError, match=said):
        make_groups(config, FOUR, [], {})


def test_text_encoders_of_which_nothing_is_known_are_named():
    config = small.sampling()
    config.t5.from_pretrained, config.clip.from_pretrained = "nowhere/my-t5", "nowhere/clip-vit-large-patch14"
    assert missing_text_encoders(config) == {"t5": "nowhere/my-t5"}  # the other has the name of the published one
    assert missing_text_encoders(small.training()) == {}


def test_a_mesh_that_does_not_fit_is_refused_as_in_training():
    assert sizes_on(MeshConfig(-1, 2, 1, 1), FOUR)["data"] == 2
    assert sizes_on(MeshConfig(1, 2, 2, 1), FOUR)["seq"] == 2
    with pytest.raises(UserError, match="mesh axes must multiply to the 4 devices here"):
        sizes_on(MeshConfig(3, 1, 1, 1), FOUR)


def test_other_configs_are_refused():
    with pytest.raises(UserError, match="neither"):
        make_groups(ConfigDict({"model": {}}), FOUR, [], {})
    config = small.training()
    del config["ema_decay"]
    with pytest.raises(UserError, match=r"config\.ema_decay is missing"):
        make_groups(config, FOUR, [], {})


def test_the_key_of_a_job_depends_on_what_is_compiled_and_not_on_where_weights_are():
    def key(config, **changes) -> str:
        job = make_groups(config, FOUR, parse_lines(["32px,9"]), {})[0].wanted[0].job
        return Job(**(vars(job) | changes)).key

    moved, wider = small.training(), small.training()
    moved.folder, moved.model.from_pretrained, moved.loop.log_every = "elsewhere", "some.safetensors", 77
    wider.model.mlp_ratio = 3.0
    assert key(small.training()) == key(moved) == key(small.training(), title="x")
    others = [key(wider), key(small.training(), topology="v5p:2x2x1"), key(small.training(), options={"a": 1})]
    assert len({key(small.training()), *others}) == 4
    job = make_groups(small.training(), FOUR, [], {})[0].wanted[0].job
    assert Job.from_json(job.to_json()).key == job.key


def test_the_key_of_a_job_depends_on_what_the_environment_tells_the_compiler(monkeypatch):
    job = make_groups(small.training(), FOUR, [], {})[0].wanted[0].job
    before = job.key
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    versions.cache_clear()
    assert job.key != before
    versions.cache_clear()
