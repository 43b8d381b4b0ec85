/**
 * Where the package is installed: `package.json`, and the captures of `test/data` that the demo sends.
 */
import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

/** The folder of package.json, seen from the source (tools/) as from the build (dist/tools/). */
export function packageRoot(): string {
  for (const up of ['../', '../../']) {
    const url = new URL(up, import.meta.url);
    if (existsSync(new URL('package.json', url))) return fileURLToPath(url);
  }
  throw new Error('the package has no package.json');
}

/** The version that package.json states. */
export function packageVersion(): string {
  const description: unknown = JSON.parse(readFileSync(`${packageRoot()}/package.json`, 'utf8'));
  if (typeof description === 'object' && description !== null && 'version' in description) {
    return String(description.version);
  }
  throw new Error('package.json states no version');
}
