"""`python -m docs.reference` (`make reference`): write what is generated and committed, the JSON schemas, anew."""

from docs import house
from docs.reference import schemas

folder = house.ROOT / schemas.FOLDER
folder.mkdir(parents=True, exist_ok=True)
wanted = schemas.files()
for file in folder.glob("*.json"):
    if file.name not in wanted:
        file.unlink()
for name, text in wanted.items():
    (folder / name).write_text(text, encoding="utf-8")
print(f"{len(wanted)} schemas in {folder}")
