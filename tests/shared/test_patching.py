"""A method is patched inside the block alone, for one object or for a class."""

import inspect

import pytest
from unmemorize.shared.patching import HookMissing, patched


class Base:
    def inherited(self, value):
        return value


class Owner(Base):
    def method(self, value):
        return value

    @classmethod
    def of_class(cls, value):
        return cls, value


def doubled(original):
    return lambda *args, **kwargs: (original(*args, **kwargs),) * 2


@pytest.mark.parametrize("name", ["method", "inherited"])
def test_one_object_is_patched_and_no_other(name):
    owner, other = Owner(), Owner()
    with patched(owner, name, doubled):
        assert getattr(owner, name)(1) == (1, 1)
        assert getattr(other, name)(1) == 1
        assert list(inspect.signature(getattr(owner, name)).parameters) == ["value"]
    assert vars(owner) == {}


@pytest.mark.parametrize("name", ["method", "inherited", "of_class"])
def test_a_class_is_patched_for_all_its_objects(name):
    def called():
        return getattr(Owner if name == "of_class" else Owner(), name)(1)

    before, plain = dict(vars(Owner)), called()
    with patched(Owner, name, doubled):
        assert called() == (plain, plain)
        assert Base().inherited(1) == 1
    assert dict(vars(Owner)) == before


def test_what_the_object_had_of_its_own_comes_back():
    owner = Owner()
    owner.method = mine = lambda value: -value
    with patched(owner, "method", doubled), patched(owner, "method", doubled):
        assert owner.method(1) == ((-1, -1), (-1, -1))
    assert vars(owner) == {"method": mine}


def test_it_is_undone_when_the_block_fails_or_is_never_entered():
    owner = Owner()
    with pytest.raises(ZeroDivisionError), patched(owner, "method", doubled):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), patched(owner, "method", lambda original: 1 / 0):
        pytest.fail("was entered")
    assert vars(owner) == {}


@pytest.mark.parametrize("owner", [Owner, Owner()])
def test_a_method_that_is_not_there_is_named(owner):
    with (
        pytest.raises(HookMissing, match=r"`Owner\.gone`"),
        patched(owner, "gone", lambda original: original),
    ):
        pytest.fail("was entered")
