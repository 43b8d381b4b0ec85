/**
 * A process that starts software devices on request, many of them one after the other or side by side: `{ id, options }` starts one and
 * is answered by `{ id, error }`, `{ id }` stops it. It ends with the process that started it.
 */
import { startDevice } from '../../dist/src/device/index.js';

const devices = new Map();

process.on('message', ({ id, options }) => {
  let error = null;
  try {
    if (options === undefined) {
      devices.get(id)?.close();
      devices.delete(id);
    } else {
      devices.set(id, startDevice(options));
    }
  } catch (cause) {
    error = String(cause);
  }
  process.send({ id, error });
});
process.on('disconnect', () => process.exit());
