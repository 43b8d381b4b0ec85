/** Counting verdicts, for every kind of report. */
import { AREAS, type Area, areaOf, type CheckResult, type Verdict } from '../../src/conform/index.ts';

export interface Summary {
  readonly pass: number;
  readonly fail: number;
  readonly notApplicable: number;
  readonly untestable: number;
}

export function summarise(results: readonly CheckResult[]): Summary {
  const count = (verdict: Verdict) => results.filter((result) => result.verdict === verdict).length;
  return {
    pass: count('pass'),
    fail: count('fail'),
    notApplicable: count('not-applicable'),
    untestable: count('untestable'),
  };
}

/** Whether the device conforms: no MUST failed. */
export function conforms(results: readonly CheckResult[]): boolean {
  return results.every(({ verdict, level }) => verdict !== 'fail' || level !== 'MUST');
}

export interface AreaResults {
  readonly area: Area;
  /** What the area is about. */
  readonly title: string;
  readonly results: readonly CheckResult[];
}

/** The results by area, in the order of the results; areas without any are left out. */
export function byArea(results: readonly CheckResult[]): AreaResults[] {
  const areas = new Map<Area, CheckResult[]>();
  for (const result of results) {
    const area = areaOf(result.id);
    const list = areas.get(area);
    if (list === undefined) areas.set(area, [result]);
    else list.push(result);
  }
  return [...areas].map(([area, list]) => ({ area, title: AREAS[area], results: list }));
}
