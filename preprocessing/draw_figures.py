"""Command that draws a set of persons, for demonstrations, tests and benchmarks without data."""

from __future__ import annotations

import argparse
import logging
import sys

from preprocessing.figures.drawn_set import FigureSettings, SettingsMismatchError, draw_dataset


def main(arguments: list[str] | None = None) -> int:
    """Draw the set; 0 when it is complete, 2 when it was asked for wrongly."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse(arguments)
    try:
        settings = FigureSettings(
            num_persons=options.persons,
            num_test_persons=options.test_persons,
            images_per_person=options.images_per_person,
            size=tuple(options.size),
            seed=options.seed,
        )
        draw_dataset(options.output, settings, options.num_workers)
    except (ValueError, SettingsMismatchError) as error:
        sys.stderr.write(f"draw_figures: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"draw_figures: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command goes on\n")
        return 1
    num_images = len(settings.persons) * settings.images_per_person
    sys.stdout.write(f"{options.output}: {num_images} images of {len(settings.persons)} persons\n")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    default = FigureSettings()
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.draw_figures",
        description="Draw persons in textured clothes, in many poses, with exact keypoints.",
        epilog="example: python -m preprocessing.draw_figures --output figures --size 256 176",
    )
    add = parser.add_argument_group("what is drawn").add_argument
    add("--persons", type=int, default=default.num_persons, help="of split train (%(default)s)")
    add(
        "--test-persons",
        type=int,
        default=default.num_test_persons,
        help="others, of split test (%(default)s)",
    )
    add("--images-per-person", type=int, default=default.images_per_person, help="(%(default)s)")
    add(
        "--size",
        type=int,
        nargs=2,
        default=default.size,
        metavar=("HEIGHT", "WIDTH"),
        help="in pixels (64 64)",
    )
    add("--seed", type=int, default=default.seed, help="another one, other persons (%(default)s)")
    add = parser.add_argument_group("where and how").add_argument
    add("--output", required=True, metavar="DIR", help="an interrupted set is completed")
    add("--num-workers", type=int, help="processes (one per core)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
