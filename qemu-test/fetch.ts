/** Fetches everything the QEMU scenarios need into the cache, and says where it is: `node dist/qemu-test/fetch.js`. */
import { cacheFolder } from './fetch/cache.ts';
import { fetchComponents } from './fetch/components.ts';
import { ToolError } from './host/process.ts';
import { openProgress } from './host/progress.ts';

const progress = openProgress(process.stderr);
try {
  const components = await fetchComponents({ cache: cacheFolder(), progress });
  progress.close();
  process.stdout.write(`${JSON.stringify(components, null, 2)}\n`);
} catch (error) {
  progress.close();
  if (!(error instanceof ToolError)) throw error;
  process.stderr.write(`error: ${error.message}\n${error.hint === undefined ? '' : `hint: ${error.hint}\n`}`);
  process.exitCode = 1;
}
