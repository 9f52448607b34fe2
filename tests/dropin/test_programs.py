"""Libraries that take a pool or an executor, given ours: they give the serial answer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cloud
import cloud.joblib
from cloud.pool import Pool
from tests.dropin.pool_functions import square
from tests.dropin.program_functions import bell, log_probability, rosenbrock

numpy = pytest.importorskip("numpy")

N = 2


@pytest.fixture
def pool(home: Path) -> Iterator[Pool]:
    with Pool(N) as pool:
        yield pool
    pool.join()


@pytest.fixture
def executor(home: Path) -> Iterator[cloud.Executor]:
    with cloud.Executor(N) as executor:
        yield executor


@pytest.fixture(params=["Pool", "Executor"])
def mapper(request: pytest.FixtureRequest) -> Any:
    """``map`` of each in turn."""
    return request.getfixturevalue(request.param.lower()).map


# --- scipy ------------------------------------------------------------------------------------------------------------


def test_differential_evolution(mapper: Any) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    options: dict[str, Any] = {"seed": 3, "maxiter": 15, "polish": False, "updating": "deferred"}
    serial = optimize.differential_evolution(rosenbrock, [(-2, 2)] * 3, **options)
    ours = optimize.differential_evolution(rosenbrock, [(-2, 2)] * 3, workers=mapper, **options)
    assert (ours.x.tolist(), ours.fun, ours.nfev) == (serial.x.tolist(), serial.fun, serial.nfev)


def test_brute(mapper: Any) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    serial = optimize.brute(rosenbrock, [(-1, 1), (-1, 1)], Ns=12, finish=None)
    assert (
        optimize.brute(rosenbrock, [(-1, 1), (-1, 1)], Ns=12, finish=None, workers=mapper).tolist() == serial.tolist()
    )


def test_quad_vec(mapper: Any) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    serial, _ = integrate.quad_vec(bell, -3, 3)
    ours, _ = integrate.quad_vec(bell, -3, 3, workers=mapper)
    assert ours == pytest.approx(serial, rel=1e-12)


# --- emcee ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["pool", "executor"])
def test_emcee(kind: str, request: pytest.FixtureRequest) -> None:
    emcee = pytest.importorskip("emcee")
    start = numpy.random.RandomState(1).randn(12, 3)

    def chain(pool: Any) -> Any:
        sampler = emcee.EnsembleSampler(12, 3, log_probability, pool=pool)
        sampler._random = numpy.random.RandomState(5)
        sampler.run_mcmc(start, 20)
        return sampler.get_chain()

    assert numpy.array_equal(chain(request.getfixturevalue(kind)), chain(None))


# --- scikit-learn -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cloud(home: Path) -> Iterator[Any]:
    joblib = pytest.importorskip("joblib")
    pytest.importorskip("sklearn")
    cloud.joblib.register()
    yield lambda: joblib.parallel_config(backend="cloud", n_jobs=N)
    cloud.joblib.shutdown()


def test_random_forest(on_cloud: Any) -> None:
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier

    x, y = make_classification(n_samples=300, n_features=8, random_state=0)
    serial = RandomForestClassifier(n_estimators=12, random_state=0).fit(x, y)
    with on_cloud():
        ours = RandomForestClassifier(n_estimators=12, random_state=0, n_jobs=N).fit(x, y)
    assert numpy.array_equal(ours.predict_proba(x), serial.predict_proba(x))


def test_grid_search_and_cross_validation(on_cloud: Any) -> None:
    from sklearn.datasets import make_regression
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, cross_val_score

    # Large enough for its arrays to be mapped.
    x, y = make_regression(n_samples=4000, n_features=40, noise=1.0, random_state=0)
    search = GridSearchCV(Ridge(), {"alpha": [0.1, 1.0, 10.0]}, cv=3)
    serial = search.fit(x, y)
    scores = cross_val_score(Ridge(), x, y, cv=4)
    with on_cloud():
        ours = GridSearchCV(Ridge(), {"alpha": [0.1, 1.0, 10.0]}, cv=3, n_jobs=N).fit(x, y)
        assert cross_val_score(Ridge(), x, y, cv=4, n_jobs=N) == pytest.approx(scores, rel=1e-9)
    assert ours.best_params_ == serial.best_params_
    assert ours.cv_results_["mean_test_score"] == pytest.approx(serial.cv_results_["mean_test_score"], rel=1e-9)


def test_parallel_estimators_in_a_parallel_search(on_cloud: Any) -> None:
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GridSearchCV

    x, y = make_classification(n_samples=200, n_features=6, random_state=0)
    grid = {"max_depth": [3]}
    serial = GridSearchCV(RandomForestClassifier(n_estimators=6, random_state=0), grid, cv=2).fit(x, y)
    with on_cloud():
        ours = GridSearchCV(RandomForestClassifier(n_estimators=6, random_state=0, n_jobs=2), grid, cv=2).fit(x, y)
    assert ours.cv_results_["mean_test_score"].tolist() == serial.cv_results_["mean_test_score"].tolist()


# --- tqdm -------------------------------------------------------------------------------------------------------------


def test_tqdm_over_imap_unordered(pool: Pool) -> None:
    tqdm = pytest.importorskip("tqdm")
    shown = io.StringIO()
    results = tqdm.tqdm(pool.imap_unordered(square, range(300), chunksize=7), total=300, file=shown)
    assert sorted(results) == [x * x for x in range(300)]
    assert "300/300" in shown.getvalue()


def test_tqdm_over_as_completed(executor: cloud.Executor) -> None:
    from concurrent.futures import as_completed

    tqdm = pytest.importorskip("tqdm")
    shown = io.StringIO()
    pending = [executor.submit(square, x) for x in range(100)]
    values = [future.result() for future in tqdm.tqdm(as_completed(pending), total=100, file=shown)]
    assert sorted(values) == [x * x for x in range(100)]
    assert "100/100" in shown.getvalue()
