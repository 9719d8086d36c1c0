"""``memc recipes``."""

from __future__ import annotations

import click

from memc.cli.console import Console
from memc.cli.options import declare
from memc.recipe import load_recipe, recipe_paths
from memc.report.listings import recipes_view
from memc.report.models import RecipeRow, RecipesDocument


@declare("recipes", "memc recipes", "memc recipes long-context > mine.yaml", "memc recipes --json")
@click.argument("name", required=False)
def command(console: Console, name: str | None) -> None:
    """Show the recipes that have a name, or print one to start your own from."""
    names = [name] if name else sorted(recipe_paths())
    found = {each: load_recipe(each) for each in names}
    if name and not console.json:
        console.text(found[name].to_yaml())
        return
    paths = recipe_paths()
    rows = [
        RecipeRow(name=each, summary=recipe.summary, passes=recipe.specs(), path=str(paths.get(each, each)))
        for each, recipe in found.items()
    ]
    document = RecipesDocument(recipes=rows)
    console.show(document, lambda: recipes_view(document))
