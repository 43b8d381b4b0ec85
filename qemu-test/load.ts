/** Finds scenarios by name: each is a file of the folder `scenarios` that exports `scenario`. */
import { readdirSync } from 'node:fs';
import { basename, dirname, extname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import type { Scenario } from './scenario.ts';

const self = fileURLToPath(import.meta.url);
/** `.js` when built, `.ts` in the source tree. */
const extension = extname(self);
const folder = join(dirname(self), 'scenarios');

export function scenarioNames(): string[] {
  return readdirSync(folder)
    .filter((name) => name.endsWith(extension) && !name.endsWith('.d.ts'))
    .map((name) => basename(name, extension))
    .sort();
}

export async function loadScenario(name: string): Promise<Scenario> {
  if (!scenarioNames().includes(name)) throw new Error(`there is no scenario ${name}`);
  const module: unknown = await import(pathToFileURL(join(folder, name + extension)).href);
  if (!isScenarioModule(module)) throw new Error(`scenarios/${name} does not export a scenario`);
  const { scenario } = module;
  const doubled = scenario.checks.filter((check, i) => scenario.checks.indexOf(check) !== i);
  if (doubled.length > 0) throw new Error(`scenario ${name} names checks twice: ${doubled.join(', ')}`);
  return scenario;
}

function isScenarioModule(module: unknown): module is { readonly scenario: Scenario } {
  if (typeof module !== 'object' || module === null || !('scenario' in module)) return false;
  const { scenario } = module;
  return typeof scenario === 'object' && scenario !== null && 'checks' in scenario && 'guest' in scenario;
}
