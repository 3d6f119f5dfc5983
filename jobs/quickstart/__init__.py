"""The quickstart: real data, all jobs with the recipes in recipes/quickstart, questions over HTTP, a report.

Start reading at `steps`.
"""
