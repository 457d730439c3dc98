"""How a config is made: `key=value` arguments, YAML files, `--help`, and the nearest key to a wrong one."""
