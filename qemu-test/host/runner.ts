/** Runs scenarios, several guests at a time: those that can share a guest do, for as long as each of them passes. */
import type { NamedScenario } from '../scenario.ts';
import { notRun, type ScenarioResult, ScenarioRun } from './scenario-run.ts';
import { type Group, Schedule } from './schedule.ts';
import { BootError, Session, type SessionOptions } from './session.ts';

export interface RunnerOptions extends SessionOptions {
  /** Guests at a time. */
  readonly jobs: number;
  readonly onStart?: (scenario: string) => void;
  readonly onResult?: (result: ScenarioResult) => void;
}

/**
 * Runs `scenarios`; the results are in their order. What comes after a scenario that did not pass runs in a fresh guest: what the other left
 * decides nothing. A guest that does not get as far as its first scenario (hung or in panic in the kernel's first seconds, seen now and then
 * under load) is started once more, and the result of that scenario says so. A scenario that has begun is never run again.
 */
export async function runScenarios(
  scenarios: readonly NamedScenario[],
  options: RunnerOptions,
): Promise<ScenarioResult[]> {
  const schedule = new Schedule(scenarios);
  const results = new Map<string, ScenarioResult>();
  const onResult = (result: ScenarioResult) => {
    results.set(result.name, result);
    options.onResult?.(result);
  };
  const job = async () => {
    for (let group = schedule.take(); group !== undefined && !options.signal.aborted; group = schedule.take()) {
      while (group.length > 0 && !options.signal.aborted) await runGuest(group, { ...options, onResult });
    }
  };
  await Promise.all(Array.from({ length: options.jobs }, job));
  return scenarios.map((scenario) => results.get(scenario.name) ?? notRun(scenario));
}

/** Runs scenarios of `group` in one guest until one does not pass. What has begun, or waits for the guest to boot, is no longer in the group. */
async function runGuest(group: Group, options: RunnerOptions): Promise<void> {
  const first = group.shift();
  if (first === undefined) return;
  options.onStart?.(first.name);
  const started = performance.now();
  const all = [first, ...group];
  let restarted: string | null = null;
  let session: Session;
  try {
    session = await Session.boot(all, options).catch((error: unknown) => {
      if (!(error instanceof BootError && error.isChance) || options.signal.aborted) throw error;
      restarted = error.message;
      return Session.boot(all, options);
    });
  } catch (error) {
    if (!(error instanceof BootError)) throw error;
    const culprit = all.find(({ name }) => name === error.scenario) ?? first;
    if (culprit !== first) {
      group.unshift(first);
      const at = group.indexOf(culprit);
      // Another job has it now, and will find out itself.
      if (at < 0) return;
      group.splice(at, 1);
    }
    options.onResult?.(bootFailure(culprit, error, restarted, (performance.now() - started) / 1000));
    return;
  }
  try {
    for (let next: NamedScenario | undefined = first; next !== undefined; next = group.shift()) {
      if (options.interactive) return await session.interact(next);
      options.onStart?.(next.name);
      const result = await session.run(next, restarted);
      options.onResult?.(result);
      if (!result.passed || options.signal.aborted) return;
      restarted = null;
    }
  } finally {
    await session.close();
  }
}

function bootFailure(
  scenario: NamedScenario,
  error: BootError,
  restarted: string | null,
  seconds: number,
): ScenarioResult {
  const run = new ScenarioRun(scenario, () => {});
  run.problems.push(error.message);
  run.console.push(...error.console);
  return run.result(seconds, restarted, []);
}
