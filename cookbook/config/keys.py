"""Finds the field that each setting of a config is for, and checks that its value fits.

A key is written in full (`dataset_builder.common_config.batch_size`) or by its last parts (`batch_size`),
which must match a single field. If one setting is meant for several fields, a recipe's defaults connect them
by chz References.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from chz.blueprint import Blueprint, Castable, Reference

from cookbook.config import other_trainers
from cookbook.config.chz_private import (
    EntrypointException,
    Params,
    missing_params,
    param_of_an_item,
    params_of,
)
from cookbook.config.config_files import (
    COMMAND_LINE,
    ClassName,
    MappingValue,
    NoValue,
    RecordedClassName,
    Setting,
    importable,
    is_foreign,
    is_own,
)
from cookbook.config.field_types import (
    CLASS_NAME,
    INDEX,
    alternatives,
    choices,
    describe_classes,
    describe_type,
    fits,
    holds_classes,
    is_list,
    is_own_class,
    is_plain_mapping,
    item_type,
    nested,
    plain_value,
    takes_item,
    takes_objects,
    to_chz_value,
)
from cookbook.errors import ConfigError
from cookbook.utils.json_files import MAX_DEPTH
from cookbook.utils.nearest import did_you_mean

logger = logging.getLogger(__name__)

UNKNOWN = object()
"""The value of a setting that has several values, as in a sweep."""


class Resolver:
    """Resolves the settings of a config to full keys. Later layers win.

    `problems` has one sentence for every setting that cannot be used, and `warnings` one for every key that
    the command line repeats, where the last value wins. `layers` has the usable settings of each layer by
    full key. A short key is resolved among the keys of its own layer and those below it. So `max_tokens` in a
    file keeps its meaning if the command line adds an evaluator with a `max_tokens` of its own. Only a key
    that is not found there is looked up among the keys that later layers add.
    """

    def __init__(
        self,
        target: type[Any],
        defaults: Mapping[str, Any],
        layers: Sequence[Sequence[Setting]],
        other_names: Sequence[str] = (),
        imports: bool = True,
    ) -> None:
        """Without `imports`, modules outside of this project are not imported. `deferred` then has the
        classes in them that settings name, and keys that may belong to such a class are not reported."""
        self.problems: list[str] = []
        self.deferred: dict[str, Setting] = {}
        self._imports = imports
        self._named = {
            setting.value.value
            for layer in layers
            for setting in layer
            if isinstance(setting.value, Castable) and not isinstance(setting.value, RecordedClassName)
        }
        self.warnings: list[str] = []
        self._target = target
        self._defaults = dict(defaults)
        self._other_names = other_names
        self._refused: set[str] = set()  # full keys of lists and classes that cannot be used
        self._structure = dict(defaults)
        self.params: Params = self._params_with({})
        scopes = [self._apply_structure(layer) for layer in layers]
        # for each layer, the settings whose fields a later layer removes
        self._replaced: list[dict[str, Setting]] = []
        self.layers = [self._resolve_layer(layer, scope) for layer, scope in zip(layers, scopes, strict=True)]
        self._add_replaced_keys()

    def type_of(self, key: str) -> Any:
        """Returns the type of the field, or of the item of a list or a mapping, at a full key."""
        return _type_of(key, self.params)

    def refusal(self, key: str, setting: Setting) -> str | None:
        """Returns the reason why a full key cannot have the value of a setting, or None if it can."""
        param = self.params.get(key) or self._param_of_an_item(key)
        if isinstance(setting.value, ClassName) and not takes_objects(param.type):
            return (
                f"{setting.place}: Invalid {key}: it is an object with `_type` {setting.value.value}, and "
                f"{key} takes {describe_type(param.type)}."
            )
        if self._is_only_recorded(param, setting.value):
            name = setting.value.value
            return (
                f"{setting.place}: {key} is {name}, which is code outside of this project, and what a run "
                f"recorded is only data. If it is yours, name it too: {key}={name}"
            )
        if self._is_deferred(param, setting.value) or fits(param, setting.value):
            return None
        return f"{setting.place}: Invalid {_written(setting)}: {self._expected_values(key, param, setting)}"

    def _is_only_recorded(self, param: Any, value: Any) -> bool:
        """Returns whether only the record of a run names this code, which is not a class of this project."""
        if not isinstance(value, RecordedClassName) or value.value in self._named:
            return False
        module, _, name = value.value.partition(":")
        if not is_own(module) or "." in name:
            return True
        return fits(param, value) and not is_own_class(param, value.value)

    def _is_deferred(self, param: Any, value: Any) -> bool:
        if self._imports or not isinstance(value, Castable) or not takes_objects(param.type):
            return False
        return CLASS_NAME.fullmatch(value.value) is not None and is_foreign(value.value)

    def _param_of_an_item(self, key: str) -> Any:
        kind = self.type_of(key)
        above = next(self.params[one] for one in _keys_above(key) if one in self.params)
        return param_of_an_item(above, key, kind)

    def blueprint(self, name_of_defaults: str) -> Blueprint[Any]:
        """Returns all settings in one blueprint. Raises ConfigError with every problem found."""
        given = self.check()
        self.raise_problems()
        values = {key: to_chz_value(setting.value, self.type_of(key)) for key, setting in given.items()}
        defaults = {key: value for key, value in self._defaults.items() if self._default_applies(key, given)}
        for value in list(defaults.values()):
            if isinstance(value, Reference) and value.ref not in {*defaults, *given}:
                defaults[value.ref] = Reference(value.ref)  # makes chz use the field's own default
        return (
            Blueprint(self._target)
            .apply(defaults, layer_name=name_of_defaults)
            .apply(values, layer_name="given")
        )

    def check(self) -> dict[str, Setting]:
        """Returns the final settings, after adding a problem for each value that cannot be used."""
        given = self.merged()
        for key, setting in given.items():
            refusal = None if setting.value is UNKNOWN else self.refusal(key, setting)
            if problem := refusal or self._gap_before(key, setting, [*given, *self._defaults]):
                self.problems.append(problem)
        return given

    def raise_problems(self) -> None:
        """Raises ConfigError with every problem found. If there is none, logs the warnings."""
        if problems := list(dict.fromkeys(self.problems)):
            if len(problems) == 1:
                raise ConfigError(problems[0])
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(f"{len(problems)} settings cannot be used.\n{listed}")
        for warning in self.warnings:
            logger.warning(warning)

    # -- which keys there are --------------------------------------------------------------------

    def _params_with(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return params_of(Blueprint(self._target).apply({**self._structure, **more}))

    def _apply_structure(self, layer: Sequence[Setting]) -> Params:
        """Applies a layer's classes and lists, from the outermost inwards. Returns the resulting keys."""
        for setting in sorted(layer, key=lambda setting: _depth_and_number(setting.key)):
            found = self._find(setting.key, self.params)
            if len(found) != 1 or not holds_classes(self.type_of(found[0])):
                continue
            if setting.value is UNKNOWN or isinstance(setting.value, NoValue):
                continue
            (key,) = found
            value = to_chz_value(setting.value, self.type_of(key))
            if self._is_deferred(self.params.get(key) or self._param_of_an_item(key), value) and not (
                self._is_only_recorded(self.params.get(key) or self._param_of_an_item(key), value)
            ):
                self._defer(key, setting)
            elif problem := self.refusal(key, setting) or self._gap_before(key, setting, self._structure):
                self._refuse(key, problem)
            elif isinstance(value, list):
                self._structure = {k: v for k, v in self._structure.items() if not k.startswith(f"{key}.")}
                self.params = self._params_with({})
            elif not isinstance(value, dict):
                try:
                    self.params = self._params_with({key: value})
                    self._structure[key] = value
                except (EntrypointException, TypeError, ValueError) as error:
                    self._refuse(key, f"{setting.place}: Invalid {_written(setting)}: {error}")
        return self.params

    def _defer(self, key: str, setting: Setting) -> None:
        """Removes a recipe's default class, because the keys of its replacement are not known yet."""
        self.deferred[key] = setting
        self._refused.add(key)
        for values in (self._structure, self._defaults):
            for one in [one for one in values if one == key or one.startswith(f"{key}.")]:
                del values[one]
        self.params = self._params_with({})

    def _refuse(self, key: str, problem: str) -> None:
        self._refused.add(key)
        self.problems.append(problem)

    def _find(self, key: str, params: Params) -> list[str]:
        """Returns the full keys that a key may mean: itself, or all that end with it."""
        if key.count(".") > MAX_DEPTH:
            return []
        if key in params:
            return [key]
        if ends := [full_key for full_key in params if full_key.endswith(f".{key}")]:
            return [full_key for full_key in ends if not self._refers_to_one_of(full_key, ends)]
        head, _, item = key.rpartition(".")
        above = self._find(head, params) if head else []
        return [f"{full_key}.{item}" for full_key in above if takes_item(_type_of(full_key, params), item)]

    def _refers_to_one_of(self, key: str, others: Sequence[str]) -> bool:
        """Returns whether a key takes its value from one of `others` unless it is set itself."""
        value = self._structure.get(key)
        while isinstance(value, Reference):
            if value.ref in others:
                return True
            value = self._structure.get(value.ref)
        return False

    def _resolve_layer(self, layer: Sequence[Setting], scope: Params) -> dict[str, Setting]:
        resolved: dict[str, Setting] = {}
        self._replaced.append(replaced := {})
        unknown_roots: set[str] = set()
        for setting in layer:
            found = self._find(setting.key, scope) or self._find(setting.key, self.params)
            if len(found) > 1:
                self.problems.append(
                    f"{setting.place}: {setting.key!r} is ambiguous. Write one of {', '.join(found)}."
                )
            elif not found:
                root = setting.key.split(".")[0]
                if root not in unknown_roots:
                    self._add_unknown(setting)
                if not self._find(root, self.params):
                    unknown_roots.add(root)
            elif found[0] in self._refused:
                continue
            elif self._find(found[0], self.params) != found:
                replaced[found[0]] = setting
            elif isinstance(setting.value, NoValue):
                self._refuse(found[0], self._no_value(found[0], setting))
            elif isinstance(setting.value, list | dict) and (refusal := self.refusal(found[0], setting)):
                self._refuse(found[0], refusal)
            elif (earlier := resolved.get(found[0])) is not None and setting.place != COMMAND_LINE:
                self.problems.append(_given_twice(found[0], earlier, setting))
            else:
                if earlier is not None:
                    written = (
                        "" if setting.value is UNKNOWN else f" ({_written(earlier)}, {_written(setting)})"
                    )
                    self.warnings.append(f"{found[0]} is given twice{written}. The last one counts.")
                resolved[found[0]] = setting
        return self._without_repeated_references(self._with_whole_mappings(resolved))

    def _with_whole_mappings(self, layer: dict[str, Setting]) -> dict[str, Setting]:
        """Returns the settings with one for each mapping of plain values, in place of those of its items."""
        found: dict[str, Setting] = {}
        items: dict[str, dict[tuple[str, ...], Any]] = {}
        for key in sorted(layer, key=_depth_and_number):
            setting = layer[key]
            fields = (one for one in (key, *_keys_above(key)) if one in self.params)
            field = next((one for one in fields if is_plain_mapping(self.params[one].type)), None)
            is_object = isinstance(setting.value, ClassName)
            is_none = setting.value is None and key == field
            if field is None or is_object or is_none or setting.value is UNKNOWN:
                found[key] = setting
            elif key != field:
                path = tuple(key.removeprefix(f"{field}.").split("."))
                between = (one for one in _keys_above(key) if one.startswith(f"{field}."))
                above = next((one for one in between if one in layer), None)
                if above is not None and not isinstance(layer[above].value, list):
                    self.problems.append(_given_twice(above, layer[above], setting))
                    continue
                items.setdefault(field, {})[path] = plain_value(setting.value)
                found.setdefault(field, setting)
            elif isinstance(value := plain_value(setting.value), dict):
                found[key] = replace(setting, value=MappingValue(value, is_whole=True))
            else:
                found[key] = setting
        for field, values in items.items():
            whole = found[field].value
            if isinstance(whole, ClassName):
                continue  # it is refused
            below = whole.items if isinstance(whole, MappingValue) else {}
            found[field] = replace(
                found[field],
                value=MappingValue({**below, **nested(values)}, is_whole=isinstance(whole, MappingValue)),
            )
        return found

    def _without_repeated_references(self, layer: dict[str, Setting]) -> dict[str, Setting]:
        """Removes settings that only repeat the value of the field that they refer to by default.

        A recorded config repeats the value of `model_name` in each field that refers to it. These fields stay
        references, so that another `model_name` on the command line reaches all of them.
        """

        def repeats(key: str) -> bool:
            reference = self._defaults.get(key)
            if not isinstance(reference, Reference) or reference.ref not in layer or key not in layer:
                return False
            return _text(layer[key].value) == _text(layer[reference.ref].value)

        return {key: setting for key, setting in layer.items() if not repeats(key)}

    def merged(self) -> dict[str, Setting]:
        """Returns the last setting of every key. A complete list replaces the one below it."""
        merged: dict[str, Setting] = {}
        for layer in self.layers:
            for key in sorted(layer, key=_depth_and_number):
                setting = layer[key]
                if is_list(self.type_of(key)) and setting.value is not UNKNOWN:
                    merged = {k: v for k, v in merged.items() if not k.startswith(f"{key}.")}
                    self._defaults = {k: v for k, v in self._defaults.items() if not k.startswith(f"{key}.")}
                has_items = any(k.startswith(f"{key}.") for k in layer)
                if isinstance(setting.value, list | dict) and (has_items or setting.value == {}):
                    merged.pop(key, None)  # its items follow
                    continue
                given = merged.get(key.rpartition(".")[0])
                if given is not None and is_list(self.type_of(key.rpartition(".")[0])):
                    self.problems.append(
                        f"{setting.place}: {setting.key} changes one item of a list that {_written(given)} "
                        f"({given.place}) gives as a whole. Give the full list here "
                        f"too, with commas between its items."
                    )
                merged[key] = _on_top_of(merged.get(key), setting)
        return merged

    def _gap_before(self, key: str, setting: Setting, keys: Iterable[str]) -> str | None:
        """Returns a note about a list item whose index skips one."""
        head, _, index = key.rpartition(".")
        if not head or not is_list(self.type_of(head)):
            return None
        there = {one.removeprefix(f"{head}.").split(".")[0] for one in keys if one.startswith(f"{head}.")}
        missing = next((number for number in range(int(index)) if str(number) not in there), None)
        if missing is None:
            return None
        return (
            f"{setting.place}: {setting.key} has no {head}.{missing} before it. The items of a list are "
            "numbered from 0."
        )

    def _default_applies(self, default: str, given: Mapping[str, Setting]) -> bool:
        """Returns whether a recipe's default still applies: not if a chosen class has no such key."""
        return default in self.params or not any(default.startswith(f"{key}.") for key in given)

    # -- messages about keys and values that cannot be used --------------------------------------

    def _add_unknown(self, setting: Setting) -> None:
        key = setting.key
        if self._is_below_a_refused_one(key) or (self.deferred and not self._describe_parent(key)):
            return
        root = key.split(".")[0]
        if not self._find(root, self.params):
            key = root if "." in key and self._other_trainers_answer(root) else key
        above = self._describe_parent(key)
        if (answer := self._other_trainers_answer(key)) is not None and not above:
            self.problems.append(f"{setting.place}: There is no key {key!r}. {answer}.")
        elif above:
            self.problems.append(f"{setting.place}: There is no key {key!r}. {above}")
        elif key in self._other_names:
            self.problems.append(
                f"{setting.place}: There is no key {key!r} of a run: it is this command's own. Write "
                f"{key}=<value> on the command line."
            )
        elif key.startswith("no_") and [self.type_of(one) for one in self._find(key[3:], self.params)] == [
            bool
        ]:
            self.problems.append(f"{setting.place}: There is no key {key!r}. Write {key[3:]}=False.")
        else:
            names = [
                *(full_key.rpartition(".")[2] for full_key in self.params),
                *self.params,
                *self._other_names,
            ]
            scalars = [
                name for name in names if not any(map(self._holds_classes, self._find(name, self.params)))
            ]
            hint = did_you_mean(key, scalars, short_forms=not self._refused)
            hint = hint or did_you_mean(key, names, short_forms=False)
            if self._refused and not hint:
                return  # it may be a key of a class that cannot be used
            self.problems.append(
                f"{setting.place}: There is no key {key!r}.{hint} Run with --help to see the keys."
            )

    def _add_replaced_keys(self) -> None:
        """Adds a problem for keys of a class that a later layer replaces with a class that lacks them."""
        for number, replaced in enumerate(self._replaced):
            later = {key: one for layer in self.layers[number + 1 :] for key, one in layer.items()}
            by_class: dict[str, list[str]] = {}
            for key in replaced:
                above = next((one for one in _keys_above(key) if one in later), None)
                is_replaced_whole = above is not None and is_list(self.type_of(above))
                if (
                    above is not None
                    and not is_replaced_whole
                    and replaced.keys().isdisjoint(_keys_above(key))
                ):
                    by_class.setdefault(above, []).append(key)
            for above, keys in by_class.items():
                listed = ", ".join(f"{key.removeprefix(f'{above}.')} ({replaced[key].place})" for key in keys)
                self.problems.append(
                    f"{later[above].place}: {_written(later[above])} has no {listed}. Take them out there, "
                    "or choose another class."
                )

    def _no_value(self, key: str, setting: Setting) -> str:
        kind = self.type_of(key)
        example = "True" if kind is bool else "module:Class" if holds_classes(kind) else "<value>"
        takes = "" if kind is bool or holds_classes(kind) else f": it takes {describe_type(kind)}"
        return f"{setting.place}: --{setting.key} has no value. Write {setting.key}={example}{takes}."

    def _is_below_a_refused_one(self, key: str) -> bool:
        return any(
            one in self._refused or self._refused.intersection(self._find(one, self.params))
            for one in _keys_above(key)
        )

    def _holds_classes(self, key: str) -> bool:
        return holds_classes(self.type_of(key))

    def _other_trainers_answer(self, key: str) -> str | None:
        """Returns the equivalent of another trainer's key.

        Returns None unless the config trains on data and has every key that the answer names.
        """
        answer = other_trainers.answer(key) if "dataset_builder" in self.params else None
        if answer is None or not all(self._find(one, self.params) for one in other_trainers.keys_in(answer)):
            return None
        return answer

    def _describe_parent(self, key: str) -> str:
        """Describes the values of the known key above `key`."""
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            found = self._find(".".join(parts[:end]), self.params)
            if len(found) != 1:
                continue
            (above,) = found
            kind = self.type_of(above)
            if is_list(kind):
                return f"{above} is a list, whose items are {above}.0, {above}.1 and so on."
            children = _children(above, self.params)
            if children:
                hint = did_you_mean(
                    ".".join([above, *parts[end:]]), [f"{above}.{child}" for child in children]
                )
                return hint.lstrip() or f"{above} takes {', '.join(children)}."
            if holds_classes(kind):
                return f"{above} has no class yet. Write {above}=module:Class, {describe_classes(kind)}."
            return f"{above} takes {describe_type(kind)}, and has no keys below it."
        return ""

    def _expected_values(self, key: str, param: Any, setting: Setting) -> str:
        value, kind = setting.value, param.type
        text = value.value if isinstance(value, Castable) else ""
        if is_list(kind) and holds_classes(kind):
            name = text if ":" in text else "module:Class"
            item = describe_classes(item_type(kind))
            return f"it is a list. Write {key}.0={name}, {item}, then {key}.0.<key>=value."
        if holds_classes(kind):
            if CLASS_NAME.fullmatch(text) and ":" in text:
                return _why_not_a_class(text, describe_classes(kind))
            children = ", ".join(_children(key, self.params))
            either = f"{key}.<key>=value for one of its keys ({children}), or " if children else ""
            return f"write {either}{key}=module:Class, {describe_classes(kind)}."
        if isinstance(value, list):
            return f"it takes {describe_type(kind)}, not a list" + (f": {param.doc}." if param.doc else ".")
        if isinstance(value, bool) and str in alternatives(kind):
            return f"it takes {describe_type(kind)}. Put it in quotes."
        hint = did_you_mean(text, map(str, choices(kind))) if text else ""
        others = [one for one, other in self.params.items() if text.lower() in choices(other.type)]
        if others and not hint:
            hint = f" {text.lower()} is a value of `{others[0]}`."
        return f"it takes {describe_type(kind)}.{hint}"


def _depth_and_number(key: str) -> tuple[int, list[int]]:
    """Returns a sort key that puts keys after those above them, and items in order of their indices."""
    parts = key.split(".")
    return len(parts), [int(part) if INDEX.fullmatch(part) else -1 for part in parts]


def _on_top_of(below: Setting | None, setting: Setting) -> Setting:
    """Returns a setting, with the items of a mapping that `below` sets and that it does not."""
    value, earlier = setting.value, below and below.value
    if not isinstance(value, MappingValue) or not isinstance(earlier, MappingValue) or value.is_whole:
        return setting
    return replace(setting, value=MappingValue({**earlier.items, **value.items}, earlier.is_whole))


def _given_twice(key: str, earlier: Setting, later: Setting) -> str:
    return f"{later.place}: {later.key} is {key}, which {earlier.place} gives already. Give it once."


def _written(setting: Setting) -> str:
    """Returns a setting as it is written. For a list or a mapping this is the key alone."""
    return setting.key if isinstance(setting.value, list | dict) else f"{setting.key}={_text(setting.value)}"


def _text(value: Any) -> str:
    if isinstance(value, MappingValue):
        return json.dumps(value.items, ensure_ascii=False, default=str)
    return value.value if isinstance(value, Castable) else str(value)


def _keys_above(key: str) -> Iterator[str]:
    while key := key.rpartition(".")[0]:
        yield key


def _type_of(key: str, params: Params) -> Any:
    if key in params:
        return params[key].type
    above = _type_of(key.rpartition(".")[0], params)
    return Any if above is Any else item_type(above)


def _children(key: str, params: Params) -> list[str]:
    below = [full_key.removeprefix(f"{key}.") for full_key in params if full_key.startswith(f"{key}.")]
    return [name for name in below if "." not in name]


def _why_not_a_class(name: str, needed: str) -> str:
    try:
        importable(name)
    except ConfigError as error:
        return f"{error}".removeprefix("_type: ") + f" It takes module:Class, {needed}."
    return f"it takes module:Class, {needed}, and this is none."


def missing_keys(blueprint: Blueprint[Any]) -> Iterator[str]:
    """Yields one sentence for each key that must be set and is not."""
    for key, param in missing_params(blueprint).items():
        kind = "module:Class" if holds_classes(param.type) else describe_type(param.type)
        yield f"{key}=<{kind}> is required" + (f": {param.doc}." if param.doc else ".")
