/**
 * Runs the QEMU scenarios: `node dist/qemu-test/run.js`. Exit code 0 when every check of every scenario that this system can run was
 * made and passed, 1 when not, 2 for wrong usage.
 */
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command, InvalidArgumentError, Option } from 'commander';
import { cacheFolder } from './fetch/cache.ts';
import { type Components, fetchComponents } from './fetch/components.ts';
import { ToolError } from './host/process.ts';
import { openProgress } from './host/progress.ts';
import { checkList, failureReport, resultTable } from './host/report.ts';
import { runScenarios } from './host/runner.ts';
import { notRun, type ScenarioResult } from './host/scenario-run.ts';
import { hasTaps, type TapSupport, tapSupport } from './host/taps.ts';
import { buildImage } from './image/build.ts';
import { loadScenario, scenarioNames } from './load.ts';
import type { NamedScenario, Scenario } from './scenario.ts';

const COMMAND = 'npm run test:qemu --';
interface Options {
  readonly only: readonly string[];
  readonly jobs: number;
  readonly interactive: boolean;
  readonly verbose: boolean;
  readonly json: boolean;
  readonly capture?: string;
  readonly list: boolean;
}

const program = new Command('qemu-test')
  .description('drives the driver and the software device in QEMU guests with a real kernel')
  .option('--only <name...>', 'run these scenarios, or all whose name begins so', [])
  .option(
    '--jobs <n>',
    'guests at a time',
    positive,
    // An emulated machine keeps one busy, its device processes included.
    availableParallelism(),
  )
  .addOption(
    new Option('--interactive', 'a shell in the guest of one scenario, with `scenario` to run it').default(false),
  )
  .option('--verbose', 'show every check', false)
  .option('--capture <folder>', "write a pcap of the frames of each of QEMU's functions")
  .option('--json', 'print the results as one JSON document', false)
  .option('--list', 'name the scenarios and stop', false)
  .parse();

const stopped = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stopped.abort());

try {
  process.exitCode = await main(program.opts<Options>());
} catch (error) {
  if (!(error instanceof ToolError)) throw error;
  process.stderr.write(
    `qemu-test: error: ${error.message}\n${error.hint === undefined ? '' : `hint: ${error.hint}\n`}`,
  );
  process.exitCode = 1;
}

async function main(options: Options): Promise<number> {
  const names = choose(options.only);
  if (names.length === 0)
    program.error(`no scenario is called ${options.only.join(', ')}; --list names them`, { exitCode: 2 });
  if (options.interactive && names.length !== 1) program.error('--interactive needs one scenario', { exitCode: 2 });
  const scenarios = new Map<string, Scenario>();
  for (const name of names) scenarios.set(name, await loadScenario(name));
  if (options.list) {
    for (const [name, { title }] of scenarios) process.stdout.write(`${name.padEnd(24)} ${title}\n`);
    return 0;
  }
  const scratch = await mkdtemp(join(tmpdir(), 'vipsec-image-'));
  try {
    const results = await runAll(scenarios, scratch, options);
    return report(results, options);
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

async function runAll(
  scenarios: ReadonlyMap<string, Scenario>,
  scratch: string,
  options: Options,
): Promise<ScenarioResult[]> {
  const cache = cacheFolder();
  const dist = join(dirname(fileURLToPath(import.meta.url)), '..');
  const packageRoot = findPackageRoot(dist);
  const progress = openProgress(process.stderr);
  const components = await fetchComponents({ cache, progress, signal: stopped.signal });
  progress.update('guest', 'building the image');
  const image = await buildImage({ components, cache, packageRoot, dist, scratch });
  progress.close();
  const taps = await findTaps(components, scenarios);
  const all = [...scenarios].map(([name, scenario]): NamedScenario => ({ name, scenario }));
  const obstacle =
    taps instanceof ToolError ? `${taps.message}${taps.hint === undefined ? '' : `; ${taps.hint}`}` : null;
  const isPossible = ({ scenario }: NamedScenario) => obstacle === null || !hasTaps(scenario.devices);
  for (const { name } of all.filter((one) => !isPossible(one))) {
    progress.finish(name, `cannot be run here: ${name}: ${obstacle}`);
  }
  const results = await runScenarios(all.filter(isPossible), {
    components,
    image,
    dist,
    guestDist: relative(packageRoot, dist),
    taps: taps instanceof ToolError ? undefined : taps,
    interactive: options.interactive,
    capture: options.capture === undefined ? undefined : resolve(options.capture),
    signal: stopped.signal,
    jobs: options.jobs,
    onStart: (name) => progress.update(name, 'starting'),
    onCheck: (name, check) => progress.update(name, check),
    onResult: ({ name, passed, seconds, restarted }) => {
      const again = restarted === null ? '' : `, started twice: ${restarted}`;
      progress.finish(name, `${passed ? 'pass' : 'FAIL'}  ${name} (${seconds.toFixed(1)} s${again})`);
    },
  });
  progress.close();
  return all.map((one) => results.find(({ name }) => name === one.name) ?? notRun(one, obstacle));
}

/** How taps are had, or why they are not; undefined when no scenario needs any. */
async function findTaps(
  components: Components,
  scenarios: ReadonlyMap<string, Scenario>,
): Promise<TapSupport | ToolError | undefined> {
  if (![...scenarios.values()].some(({ devices }) => hasTaps(devices))) return undefined;
  try {
    return await tapSupport(components);
  } catch (error) {
    if (error instanceof ToolError) return error;
    throw error;
  }
}

function report(results: readonly ScenarioResult[], { json, verbose, interactive }: Options): number {
  if (interactive) return 0;
  const failed = results.filter((result) => !result.passed && result.obstacle === null);
  // What could not be run proves nothing: it is reported in other words than a failure, and is none the less no pass.
  const passed = results.every((result) => result.passed);
  if (json) {
    process.stdout.write(`${JSON.stringify({ scenarios: results, passed }, null, 2)}\n`);
  } else {
    if (verbose) for (const result of results) process.stdout.write(`${result.name}\n${checkList(result)}`);
    process.stdout.write(resultTable(results));
    for (const result of failed) process.stdout.write(failureReport(result, COMMAND));
  }
  return passed ? 0 : 1;
}

function choose(only: readonly string[]): string[] {
  const all = scenarioNames();
  if (only.length === 0) return all;
  return all.filter((name) =>
    only.some((wanted) => name === wanted || (!all.includes(wanted) && name.startsWith(wanted))),
  );
}

function findPackageRoot(from: string): string {
  for (let folder = from; ; folder = dirname(folder)) {
    if (existsSync(join(folder, 'package.json')) && existsSync(join(folder, 'node_modules'))) return folder;
    if (folder === dirname(folder))
      throw new ToolError(`no package.json above ${from}`, 'run it from a built work tree');
  }
}

function positive(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('must be 1 or more');
  return value;
}
