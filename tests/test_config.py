"""Options: defaults, merging, files, and the message of every refusal."""

import textwrap

import pytest

from sparse_compile import Config, settings
from sparse_compile.errors import ConfigError, SparseCompileError


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SparseCompileError)
    return str(caught.value)


def toml(tmp_path, text, name="options.toml"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


class TestDefaults:
    def test_default_is_exact(self):
        config = Config()
        assert (config.policy, config.p, config.k) == ("exact", None, None)
        assert (config.block_size, config.min_tokens) == (64, 0)
        assert (config.verify, config.strict) == (False, False)
        assert config == Config.from_options() == Config.from_options({})

    def test_p_and_k_get_their_policys_default(self):
        assert Config(policy="top_p").p == 0.95
        assert Config(policy="top_k").k == 16
        assert Config(policy="top_p").k is None
        assert Config(policy="top_k").p is None

    @pytest.mark.parametrize(
        ("options", "forced"),
        [
            ({}, (1, 2)),
            ({"k": 3}, (1, 2)),
            ({"k": 2}, (1, 1)),
            ({"k": 1}, (0, 1)),
            ({"k": 2, "sinks": 0}, (0, 2)),
            ({"k": 2, "local": 2}, (0, 2)),
            ({"sinks": 4, "local": 5}, (4, 5)),
        ],
        ids=str,
    )
    def test_blocks_that_are_always_read(self, options, forced):
        assert Config(policy="top_k", **options).forced_blocks() == forced

    def test_none_means_not_given(self):
        assert Config.from_options({"p": None, "policy": None}) == Config()

    def test_frozen(self):
        with pytest.raises(AttributeError):
            Config().policy = "top_k"

    def test_the_callers_dicts_may_change_later(self):
        override = {"block_size": 32}
        sites, inductor = {"a": override}, {"max_autotune": True}
        config = Config(sites=sites, inductor=inductor)
        override["block_size"] = 7
        sites["b"] = {}
        inductor.clear()
        assert config.sites == {"a": {"block_size": 32}}
        assert config.inductor == {"max_autotune": True}

    @pytest.mark.parametrize(
        "config",
        [
            Config(),
            Config(policy="top_p", p=0.5, min_tokens=4096),
            Config(sites={"a": {"block_size": 16}}, inductor={"max_autotune": True}, strict=True),
        ],
        ids=["default", "top-p", "sites"],
    )
    def test_options_give_the_same_config_back(self, config):
        assert Config(**config.to_options()) == config


class TestNames:
    def test_prefix_is_optional(self):
        assert Config.from_options({"sparse_compile.block_size": 32}).block_size == 32

    def test_twice(self):
        text = message(Config.from_options, {"strict": True, "sparse_compile.strict": False})
        assert text.startswith('the option "strict" is given twice')

    def test_unknown_names_the_nearest_and_all(self):
        text = message(Config.from_options, {"polcy": "exact"})
        assert text == (
            'unknown option "polcy".\n'
            "  Expected one of: block_size, inductor, k, local, min_tokens, p, policy, scores, "
            "sinks, sites, strict, verify.\n"
            '  Did you mean "policy"?'
        )

    def test_unknown_without_a_near_one(self):
        assert message(Config.from_options, {"zzz": 1}).endswith("Remove it.")

    def test_no_string(self):
        assert message(Config.from_options, {3: 1}).startswith("unknown option 3.")

    @pytest.mark.parametrize("key", ["max_autotune", "triton.cudagraphs", "epilogue-fusion"])
    def test_an_option_of_inductor(self, key):
        text = message(Config.from_options, {key: True})
        assert f'unknown option "{key}"' in text
        assert f'It is an option of Inductor: write inductor = {{"{key}": ...}}.' in text

    def test_options_that_are_no_dict(self):
        assert message(Config.from_options, ["strict"]).startswith(
            "options is ['strict'] (a list).\n  Expected a dict."
        )


class TestValues:
    @pytest.mark.parametrize(
        ("options", "first", "expected"),
        [
            ({"policy": "topk"}, 'policy is "topk" (a string)', "exact, top_p, top_k, native"),
            ({"policy": 3}, "policy is 3.", "one of exact"),
            ({"policy": ["exact"]}, "policy is ['exact'] (a list)", "one of exact"),
            ({"policy": "top_p", "p": 1.5}, "p is 1.5.", "a number above 0 and at most 1"),
            ({"policy": "top_p", "p": 0}, "p is 0.", "a number above 0 and at most 1"),
            ({"policy": "top_p", "p": -0.1}, "p is -0.1.", "a number above 0 and at most 1"),
            ({"policy": "top_p", "p": float("nan")}, "p is nan.", "above 0 and at most 1"),
            ({"policy": "top_p", "p": "0.9"}, 'p is "0.9" (a string)', "a number above 0"),
            ({"policy": "top_p", "p": True}, "p is True (a bool)", "a number above 0"),
            ({"policy": "top_k", "k": 0}, "k is 0.", "an integer of at least 1"),
            ({"policy": "top_k", "k": -3}, "k is -3.", "an integer of at least 1"),
            ({"policy": "top_k", "k": 2.0}, "k is 2.0.", "an integer of at least 1"),
            ({"policy": "top_k", "k": True}, "k is True (a bool)", "an integer of at least 1"),
            ({"policy": "top_k", "k": "8"}, 'k is "8" (a string)', "an integer of at least 1"),
            ({"policy": "top_k", "k": 65}, "k is 65.", "at most 64 KV blocks"),
            ({"policy": "top_k", "sinks": -1}, "sinks is -1.", "an integer of at least 0"),
            ({"policy": "top_k", "sinks": True}, "sinks is True (a bool)", "an integer of"),
            ({"policy": "top_k", "local": 0}, "local is 0.", "an integer of at least 1"),
            ({"policy": "top_k", "scores": "max"}, 'scores is "max" (a string)', "bounds, mean"),
            ({"policy": "top_k", "scores": 1}, "scores is 1.", "one of bounds, mean"),
            ({"block_size": 48}, "block_size is 48.", "the integer 16, 32, 64 or 128"),
            ({"block_size": "64"}, 'block_size is "64" (a string)', "16, 32, 64 or 128"),
            ({"block_size": True}, "block_size is True (a bool)", "16, 32, 64 or 128"),
            ({"min_tokens": -1}, "min_tokens is -1.", "an integer of at least 0"),
            ({"min_tokens": 1.5}, "min_tokens is 1.5.", "an integer of at least 0"),
            ({"min_tokens": False}, "min_tokens is False (a bool)", "an integer of at least 0"),
            ({"verify": 1}, "verify is 1.", "true or false"),
            ({"strict": "true"}, 'strict is "true" (a string)', "true or false"),
            ({"sites": ["a"]}, "sites is ['a'] (a list)", "a table (a dict)"),
            ({"sites": {"a": "exact"}}, 'sites["a"] is "exact" (a string)', "a table (a dict)"),
            ({"sites": {1: {}}}, "a pattern in sites is 1.", "a string"),
            ({"inductor": "max"}, 'inductor is "max" (a string)', "a table (a dict)"),
        ],
        ids=lambda value: repr(value) if isinstance(value, dict) else "",
    )
    def test_refused(self, options, first, expected):
        text = message(Config.from_options, options)
        lines = text.splitlines()
        assert lines[0].startswith(first)
        assert lines[1].startswith("  Expected ")
        assert expected in lines[1]
        assert len(lines) == 3
        assert lines[2].endswith((".", "?"))
        assert message(Config, **options) == text

    def test_misspelt_policy_names_the_nearest(self):
        assert message(Config, policy="topk").endswith('Did you mean "top_k"?')

    @pytest.mark.parametrize("p", [1e-9, 0.5, 1, 1.0])
    def test_p_in_range(self, p):
        assert Config(policy="top_p", p=p).p == p


class TestCombinations:
    def test_p_with_exact(self):
        assert message(Config.from_options, {"policy": "exact", "p": 0.9}) == (
            'p is 0.9, but policy is "exact".\n'
            "  Expected p only with policy top_p.\n"
            '  Remove p, or set policy to "top_p".'
        )

    def test_p_alone_is_p_with_exact(self):
        assert message(Config.from_options, {"p": 0.9}).startswith(
            'p is 0.9, but policy is "exact"'
        )

    def test_k_with_top_p(self):
        text = message(Config, policy="top_p", k=8)
        assert text.startswith('k is 8, but policy is "top_p".')
        assert text.endswith('Remove k, or set policy to "top_k".')

    def test_more_forced_blocks_than_there_is_room_for(self):
        text = message(Config, policy="top_k", k=4, sinks=2, local=3)
        assert text.startswith("sinks is 2 and local 3, but k is 4.")
        assert message(Config, policy="top_k", sinks=16).startswith(
            "sinks is 16 and local 1, but k"
        )

    @pytest.mark.parametrize("option", [{"sinks": 0}, {"local": 1}, {"scores": "mean"}], ids=str)
    def test_options_of_top_k_elsewhere(self, option):
        (name,) = option
        text = message(Config, policy="top_p", **option)
        assert text.startswith(f'{name} is {option[name]}, but policy is "top_p"')
        dropped = Config(policy="top_k", sites={"a": {"policy": "exact"}}, **option)
        assert getattr(dropped.for_site("a"), name) is None

    def test_p_with_top_k(self):
        assert message(Config, policy="top_k", p=0.9).startswith('p is 0.9, but policy is "top_k"')

    def test_p_with_native(self):
        assert message(Config, policy="native", p=1).startswith('p is 1, but policy is "native"')

    def test_exact_has_no_length_threshold(self):
        assert message(Config, min_tokens=128) == (
            'min_tokens is 128, but policy is "exact".\n'
            "  Expected min_tokens only with policy top_p, top_k or native.\n"
            '  Remove min_tokens, or set policy to "top_p".'
        )
        assert Config(min_tokens=0) == Config()


class TestRunnable:
    def test_policies_this_version_cannot_run(self):
        text = message(Config.from_options, {"policy": "native"})
        assert text.startswith("policy native needs the module that learns its selection, which ")
        assert 'Set policy to "exact"' in text
        assert message(Config.from_options, Config(policy="native")) == text

    def test_also_of_one_site(self):
        text = message(Config.from_options, {"sites": {"layers.0": {"policy": "native"}}})
        assert text.startswith("policy native needs")

    def test_a_wrong_value_is_told_first(self):
        assert message(Config.from_options, {"policy": "top_p", "p": 2}).startswith("p is 2.")

    def test_a_config_is_taken_as_it_is(self):
        config = Config(strict=True)
        assert Config.from_options(config) is config


class TestSites:
    def test_first_matching_pattern_wins(self):
        config = Config(
            policy="top_p",
            p=0.9,
            min_tokens=512,
            sites={
                "model.layers.0.*": {"policy": "exact"},
                "model.layers.[12].*": {"policy": "top_k", "block_size": 32},
                "model.*": {"p": 0.99},
            },
        )
        first = config.for_site("model.layers.0.self_attn")
        assert (first.policy, first.p, first.min_tokens, first.block_size) == ("exact", None, 0, 64)
        second = config.for_site("model.layers.2.self_attn")
        assert (second.policy, second.p, second.k, second.block_size) == ("top_k", None, 16, 32)
        assert second.min_tokens == 512
        third = config.for_site("model.layers.7.self_attn")
        assert (third.policy, third.p, third.min_tokens) == ("top_p", 0.99, 512)
        assert config.for_site("vision.0") is config

    def test_every_site_of_a_module(self):
        config = Config(sites={"encoder.attn#2": {"block_size": 16}, "*.attn": {"block_size": 32}})
        names = ("encoder.attn", "encoder.attn#2", "encoder.attn#3", "encoder.mlp")
        assert [config.for_site(name).block_size for name in names] == [32, 16, 32, 64]

    def test_case_matters(self):
        config = Config(sites={"Model.*": {"block_size": 16}})
        assert config.for_site("model.0").block_size == 64

    def test_the_rest_is_kept(self):
        config = Config(strict=True, inductor={"max_autotune": True}, sites={"a": {}})
        site = config.for_site("a")
        assert site.strict
        assert site.inductor == {"max_autotune": True}

    def test_wrong_value_names_the_pattern(self):
        text = message(Config, sites={"a.*": {"policy": "top_k", "k": 0}})
        assert text.startswith('sites["a.*"]: k is 0.')

    def test_combination_with_the_models_policy(self):
        text = message(Config, policy="top_p", sites={"a": {"k": 4}})
        assert text.startswith('sites["a"]: k is 4, but policy is "top_p".')

    def test_options_of_the_whole_model(self):
        text = message(Config, sites={"a": {"strict": True}})
        assert text.startswith('sites["a"]: unknown option "strict".')
        assert text.endswith("Move strict out of sites: it holds for the whole model.")

    def test_unknown_name(self):
        text = message(Config, sites={"a": {"blocksize": 64}})
        assert text.endswith('Did you mean "block_size"?')


class TestInductor:
    def test_passed_through(self):
        options = {"max-autotune": True, "triton.cudagraphs": False}
        config = Config.from_options({"inductor": options})
        assert config.inductor == {"max_autotune": True, "triton.cudagraphs": False}

    def test_unknown(self):
        text = message(Config.from_options, {"inductor": {"max_autotun": True}})
        assert text.startswith('inductor: unknown option "max_autotun".')
        assert text.endswith('Did you mean "max_autotune"?')

    def test_wrong_type(self):
        text = message(Config.from_options, {"inductor": {"max_autotune": "yes"}})
        assert text.startswith('inductor["max_autotune"] is "yes" (a string).')
        assert "a value of type bool" in text

    def test_nested_table(self):
        text = message(Config.from_options, {"inductor": {"triton": {"cudagraphs": True}}})
        assert text.endswith('Write "triton.cudagraphs" as one quoted key.')


class TestToml:
    @pytest.mark.parametrize("header", ["", "[sparse_compile]", "[tool.sparse_compile]"])
    def test_where_the_table_may_stand(self, tmp_path, header):
        path = toml(
            tmp_path, f"{header}\nblock_size = 32\nsites = {{'a.*' = {{block_size = 16}}}}\n"
        )
        config = Config.from_toml(path)
        assert config.block_size == 32
        assert config.for_site("a.b").block_size == 16
        assert config == Config.from_toml(str(path))

    def test_syntax_error_has_path_and_line(self, tmp_path):
        path = toml(tmp_path, 'block_size = 64\npolicy = exact\nstrict = "no\n')
        text = message(Config.from_toml, path)
        assert text.startswith(f"{path}:2: ")
        assert "in the line: policy = exact" in text.splitlines()[0]
        assert "strings need quotes" in text

    def test_syntax_error_at_the_end(self, tmp_path):
        path = toml(tmp_path, "block_size = 64\nsites = {\n")
        line = int(message(Config.from_toml, path).removeprefix(f"{path}:").split(":")[0])
        assert line in (2, 3)

    def test_wrong_value_has_the_path(self, tmp_path):
        path = toml(tmp_path, 'block_size = "64"\n')
        assert message(Config.from_toml, path).startswith(f'{path}: block_size is "64" (a string).')

    def test_unknown_name_has_the_path(self, tmp_path):
        path = toml(tmp_path, "[sparse_compile]\nstrickt = true\n")
        text = message(Config.from_toml, path)
        assert text.startswith(f'{path}: unknown option "strickt".')
        assert text.endswith('Did you mean "strict"?')

    def test_missing_file(self, tmp_path):
        text = message(Config.from_toml, tmp_path / "none.toml")
        assert text.startswith(f"{tmp_path / 'none.toml'}: cannot be read (No such file")

    def test_folder(self, tmp_path):
        assert "cannot be read (Is a directory)" in message(Config.from_toml, tmp_path)

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "latin.toml"
        path.write_bytes(b"# caf\xe9\n")
        assert message(Config.from_toml, path).startswith(f"{path}: byte 5 is not UTF-8.")

    def test_project_file_without_our_table(self, tmp_path):
        path = toml(tmp_path, "[tool.other]\nx = 1\n", "pyproject.toml")
        assert message(Config.from_toml, path).startswith(
            f"{path}: [tool.sparse_compile] is missing."
        )

    def test_table_that_is_none(self, tmp_path):
        path = toml(tmp_path, "sparse_compile = 3\n")
        assert message(Config.from_toml, path).startswith(f"{path}: [sparse_compile] is 3.")


class TestEnvironment:
    def use(self, monkeypatch, path):
        monkeypatch.setenv(settings.CONFIG_VARIABLE, str(path))

    def test_default_file(self, tmp_path, monkeypatch):
        self.use(monkeypatch, toml(tmp_path, "block_size = 32\nverify = true\n"))
        config = Config.from_options()
        assert (config.block_size, config.verify) == (32, True)
        assert Config.from_options(Config()).block_size == 64

    def test_options_win_field_by_field(self, tmp_path, monkeypatch):
        text = """
            block_size = 32
            verify = true
            [sites."a.*"]
            block_size = 16
            [sites."*"]
            block_size = 64
            [inductor]
            max_autotune = true
            epilogue_fusion = false
        """
        self.use(monkeypatch, toml(tmp_path, text))
        config = Config.from_options(
            {
                "verify": False,
                "sites": {"a.b": {"block_size": 128}},
                "inductor": {"max_autotune": False},
            }
        )
        assert (config.block_size, config.verify) == (32, False)
        assert list(config.sites) == ["a.b", "a.*", "*"]
        assert config.for_site("a.b").block_size == 128
        assert config.for_site("a.c").block_size == 16
        assert config.inductor == {"max_autotune": False, "epilogue_fusion": False}

    def test_another_policy_drops_what_belongs_to_the_files(self, tmp_path, monkeypatch):
        self.use(monkeypatch, toml(tmp_path, 'policy = "top_p"\np = 0.9\nmin_tokens = 64\n'))
        assert Config.from_options({"policy": "exact"}) == Config()

    def test_the_file_alone_must_be_right(self, tmp_path, monkeypatch):
        path = toml(tmp_path, "k = 4\n")
        self.use(monkeypatch, path)
        text = message(Config.from_options, {"policy": "top_k"})
        assert text.startswith(f'{path}: k is 4, but policy is "exact".')

    @pytest.mark.parametrize("value", ["", "no/such/file.toml"])
    def test_bad_config_file(self, monkeypatch, value):
        self.use(monkeypatch, value)
        text = message(Config.from_options)
        assert text.startswith(f'the environment variable SPARSE_COMPILE_CONFIG is "{value}".')

    def test_cache_dir(self, tmp_path):
        assert settings.read({settings.CACHE_VARIABLE: str(tmp_path / "x")}).cache_dir == (
            tmp_path / "x"
        )
        assert settings.read({}).cache_dir.name == "sparse_compile"
        assert settings.read({}).config_file is None

    @pytest.mark.parametrize("value", ["", "relative/folder", __file__])
    def test_bad_cache_dir(self, value):
        text = message(settings.read, {settings.CACHE_VARIABLE: value})
        assert text.startswith(f'the environment variable SPARSE_COMPILE_CACHE_DIR is "{value}".')
