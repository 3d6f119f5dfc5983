"""Pages and reports: Jinja templates over one base template with one style, charts, sheets of small pictures.

A report is a template (`*.html.j2`) beside the code that knows what it says; `templates.render` makes the page.
"""
