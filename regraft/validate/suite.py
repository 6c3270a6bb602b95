"""The Great Expectations suite: built from what is expected, run on the frames of measured columns, shown in data docs.

The library takes seconds to load, so it is loaded here and nowhere else, when the suite runs. Its context lives in memory;
nothing is sent anywhere. Results are booleans: which rows are concerned, and what was measured, is already known.
"""

import logging
import os
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from regraft.validate.expectations import Expected

if TYPE_CHECKING:
    import great_expectations as gx

RUN_TIME = datetime(2000, 1, 1, tzinfo=UTC)
"""What every result calls its time, so that equal data makes equal docs; `docs.py` takes it out of the pages."""


def run_suite(expectations: Sequence[Expected], frames: dict[str, pa.Table], site: Path) -> dict[str, bool]:
    """Judge every expectation, write the data docs' pages into `site`, and return what passed, by name.

    An expectation that raised, or that is missing from the results, has not passed.

    Args:
        expectations: what to judge.
        frames: the frames of measured columns by name; see `expectations.py`.
        site: an empty folder.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.ERROR)  # a hundred lines on its own methods at INFO
    with warnings.catch_warnings():
        # Its modules, and those that they load, use what Python 3.11 calls deprecated.
        warnings.simplefilter("ignore")
        return _run(expectations, frames, site)


def _run(expectations: Sequence[Expected], frames: dict[str, pa.Table], site: Path) -> dict[str, bool]:
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    context = _context(site)
    source = context.data_sources.add_pandas("measured")
    passed = {each.name: False for each in expectations}
    for name, frame in frames.items():
        suite = context.suites.add(gx.ExpectationSuite(name=name))
        for each in expectations:
            if each.frame == name:
                suite.add_expectation(_expectation(each))
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        outcome = definition.run(
            batch_parameters={"dataframe": frame.to_pandas()},
            result_format="BOOLEAN_ONLY",
            run_id=RunIdentifier(run_name=name, run_time=RUN_TIME),
        )
        for result in outcome.results:
            passed[result.expectation_config.meta["name"]] = bool(result.success)
    context.build_data_docs()
    return passed


def _context(site: Path) -> "gx.data_context.EphemeralDataContext":
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
        data_docs_sites={
            "local": {
                "class_name": "SiteBuilder",
                "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.absolute())},
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            }
        },
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _expectation(each: Expected) -> Any:
    from great_expectations import expectations as gxe

    common: dict[str, Any] = {
        "column": each.column,
        "severity": "critical" if each.level == "block" else "warning",
        "notes": each.sentence,
        "meta": {"name": each.name},
    }
    match each.check:
        case "sum at least":
            return gxe.ExpectColumnSumToBeBetween(min_value=each.threshold, **common)
        case "sum at most":
            return gxe.ExpectColumnSumToBeBetween(max_value=each.threshold, **common)
        case "mean at least":
            return gxe.ExpectColumnMeanToBeBetween(min_value=each.threshold, **common)
        case "mean at most":
            return gxe.ExpectColumnMeanToBeBetween(max_value=each.threshold, **common)
        case "minimum at least":
            return gxe.ExpectColumnMinToBeBetween(min_value=each.threshold, **common)
        case "contains":
            return gxe.ExpectColumnDistinctValuesToContainSet(value_set=list(each.values), **common)
