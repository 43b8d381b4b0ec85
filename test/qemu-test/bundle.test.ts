import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { bundlePrograms, FOLDERS, PROGRAMS } from '../../qemu-test/image/bundle.ts';

let scratch: string;
beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), 'vipsec-bundle-test-'));
});
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

/** A package with the folders that are bundled, each of which has a program, and `files`. */
function packageWith(files: Readonly<Record<string, string>>): string {
  const dist = mkdtempSync(join(scratch, 'dist-'));
  const all = {
    ...Object.fromEntries(PROGRAMS.map((path) => [path, ''])),
    ...Object.fromEntries(FOLDERS.map((folder) => [join(folder, 'empty.js'), ''])),
    ...files,
  };
  writeFileSync(join(dist, 'package.json'), '{"type":"module"}');
  for (const [path, text] of Object.entries(all)) {
    mkdirSync(dirname(join(dist, path)), { recursive: true });
    writeFileSync(join(dist, path), text);
  }
  return dist;
}

describe('the bundled programs', () => {
  it('are where they were, share what they have in common, and every module believes that it is where it was', async () => {
    const program = "import { place } from '../../src/place.js'; console.log(place, import.meta.url);";
    const dist = packageWith({
      'src/place.js': 'const { url } = import.meta; export const place = url;',
      'qemu-test/guest/one.js': program,
      'qemu-test/guest/two.js': program,
    });
    const output = join(scratch, 'output');
    await bundlePrograms(dist, output, '/app/dist');
    writeFileSync(join(output, 'package.json'), '{"type":"module"}');
    for (const name of ['one', 'two']) {
      const said = execFileSync(process.execPath, [join(output, `qemu-test/guest/${name}.js`)], { encoding: 'utf8' });
      expect(said).toBe(`file:///app/dist/src/place.js file:///app/dist/qemu-test/guest/${name}.js\n`);
    }
    expect(readdirSync(output).sort()).toEqual(['chunks', 'package.json', 'qemu-test', 'tools']);
  });

  it("take Node's own modules in each of the ways in which one is imported", async () => {
    const program = `
      import url from 'node:url';
      import { basename as last, join } from 'node:path';
      import * as system from 'node:os';
      console.log(url.URL === URL, last(join('a', 'b')), system.EOL === '\\n');`;
    const dist = packageWith({ 'qemu-test/guest/built-ins.js': program });
    const output = join(scratch, 'built-ins');
    await bundlePrograms(dist, output, '/app/dist');
    writeFileSync(join(output, 'package.json'), '{"type":"module"}');
    const file = join(output, 'qemu-test/guest/built-ins.js');
    expect(execFileSync(process.execPath, [file], { encoding: 'utf8' })).toBe('true b true\n');
    expect(readFileSync(file, 'utf8')).not.toMatch(/^import/m);
  });

  it('are not made when a module is missing', async () => {
    const dist = packageWith({ 'qemu-test/guest/one.js': "import './absent.js';" });
    await expect(bundlePrograms(dist, join(scratch, 'none'), '/app/dist')).rejects.toThrow('absent.js');
  });
});
