from importlib import metadata

from recipe_lib.versions import PACKAGES, versions


def test_the_table_names_what_is_installed():
    table = versions()["version"]
    assert table["numpy"] == metadata.version("numpy") and set(table.index) == {"python", *PACKAGES}
