import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';

const root = new URL('../../', import.meta.url).pathname;

/** What a user of the package can import: the driver, the software device, and the conformance suite; and the errors that all three export. */
const PUBLIC = ['src/index.ts', 'src/device/index.ts', 'src/conform/index.ts', 'src/errors.ts'];

test('the command line is built on the public API of the package only', () => {
  const files = readdirSync(join(root, 'tools'), { recursive: true, encoding: 'utf8' }).filter((name) =>
    name.endsWith('.ts'),
  );
  expect(files.length).toBeGreaterThan(10);
  for (const file of files) {
    const source = readFileSync(join(root, 'tools', file), 'utf8');
    for (const [, path] of source.matchAll(/(?:from|import\()\s*'((?:\.\.\/)+src\/[^']+)'/g)) {
      expect(PUBLIC, `tools/${file} imports ${path}`).toContain(path.replaceAll('../', ''));
    }
  }
});
