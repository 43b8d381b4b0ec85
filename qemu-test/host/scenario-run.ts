/** What comes out of one scenario: its checks, what went wrong beside them, its part of the console. */
import { outcomeOf } from '../guest/guest.ts';
import type { GuestMessage } from '../messages.ts';
import type { NamedScenario } from '../scenario.ts';
import { consoleFaults } from './faults.ts';

const CONSOLE_LINES = 40;

export interface CheckResult {
  readonly name: string;
  readonly verdict: 'pass' | 'fail' | 'not run';
  readonly detail: string;
  readonly ms: number;
}

export interface ScenarioResult {
  readonly name: string;
  readonly title: string;
  readonly passed: boolean;
  /** Without the boot of its guest. */
  readonly seconds: number;
  /** Scenarios that its guest had run before. */
  readonly before: readonly string[];
  /** Why the machine was started again: what ended its first start before the scenario began. */
  readonly restarted: string | null;
  /** Why this system cannot run it; then nothing was checked. */
  readonly obstacle: string | null;
  readonly checks: readonly CheckResult[];
  /** What went wrong beside the checks: a time-out, a crash, an IOMMU fault on the console. */
  readonly problems: readonly string[];
  /** The end of the guest's console. */
  readonly console: readonly string[];
}

export class ScenarioRun {
  readonly name: string;
  readonly problems: string[] = [];
  readonly console: string[] = [];
  /** Resolves when the guest's half has ended in whatever way. */
  readonly over: Promise<void>;
  /** The check that is being made. */
  current = '';
  readonly #scenario: NamedScenario['scenario'];
  readonly #onBegin: (check: string) => void;
  readonly #checks = new Map<string, CheckResult>();
  #finish: () => void = () => {};

  constructor({ name, scenario }: NamedScenario, onBegin: (check: string) => void) {
    this.name = name;
    this.#scenario = scenario;
    this.#onBegin = onBegin;
    this.over = new Promise((resolve) => {
      this.#finish = resolve;
    });
  }

  heard(message: GuestMessage): void {
    if (message.type === 'begin') {
      this.current = message.check;
      this.#onBegin(message.check);
    } else if (message.type === 'check') {
      this.#record(message.check, message.ok, message.detail, message.ms);
    } else if (message.type === 'exit') {
      this.problems.push(`the guest's process ended with ${message.status}`);
      this.#finish();
    } else if (message.type === 'end') {
      if (message.error !== null) this.problems.push(`the guest's half failed: ${message.error}`);
      for (const what of message.left) this.problems.push(`left behind in the guest: ${what}`);
      this.#finish();
    }
  }

  /** Makes a check on the host, as `Guest.check` does in the guest. */
  async check(name: string, body: () => unknown): Promise<boolean> {
    const { ok, detail, ms } = await outcomeOf(body);
    this.#record(name, ok, detail, ms);
    return ok;
  }

  result(seconds: number, restarted: string | null, before: readonly string[]): ScenarioResult {
    const { title, checks: expected, allowedFaults = [] } = this.#scenario;
    const checks = expected.map(
      (name): CheckResult => this.#checks.get(name) ?? { name, verdict: 'not run', detail: '', ms: 0 },
    );
    const problems = [
      ...this.problems,
      ...[...this.#checks.keys()]
        .filter((name) => !expected.includes(name))
        .map((name) => `check '${name}' is not in the scenario's list`),
      ...consoleFaults(this.console, allowedFaults).map((line) => `on the console: ${line}`),
    ];
    return {
      name: this.name,
      title,
      passed: problems.length === 0 && checks.every((check) => check.verdict === 'pass'),
      seconds,
      before,
      restarted,
      obstacle: null,
      checks,
      problems,
      console: this.console.slice(-CONSOLE_LINES),
    };
  }

  #record(name: string, ok: boolean, detail: string, ms: number): void {
    if (this.#checks.has(name)) this.problems.push(`check '${name}' was made twice`);
    this.#checks.set(name, { name, verdict: ok ? 'pass' : 'fail', detail, ms });
    if (this.current === name) this.current = '';
  }
}

/** The result of a scenario that was not begun. */
export function notRun({ name, scenario }: NamedScenario, obstacle: string | null = null): ScenarioResult {
  const run = new ScenarioRun({ name, scenario }, () => {});
  run.problems.push('not run');
  return { ...run.result(0, null, []), obstacle };
}
